"""Swapping modules in and out of a model."""

import pytest
import torch
from support.tiny_models import albert, bert_sequence_classification
from torch import nn

from hf_lossless_lr.errors import TargetError
from hf_lossless_lr.layers.replacement import in_place, replace_modules, taking_turns

QUERY = "bert.encoder.layer.0.attention.self.query"
WIDE = "bert.encoder.layer.1.intermediate.dense"


class Doubled(nn.Module):
    """A layer whose output is twice that of another one, so that its use shows."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]  # in a list, so that it is no submodule

    def forward(self, x):
        return 2 * self.layer[0](x)


def paths(model):
    return dict(model.named_modules(remove_duplicate=False))


def identities(model):
    return {path: id(module) for path, module in paths(model).items()}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture
def bert():
    return bert_sequence_classification()


class TestReplacing:
    def test_puts_each_new_module_under_its_name_and_nothing_else(self, bert):
        model, _ = bert
        before = paths(model)
        new = {QUERY: nn.Linear(32, 32), WIDE: nn.Linear(32, 48)}
        replace_modules(model, new)
        after = paths(model)
        assert list(after) == list(before)
        assert {path for path in after if after[path] is not before[path]} == set(new)
        assert all(after[path] is module for path, module in new.items())

    def test_changes_what_the_model_computes(self, bert):
        model, batch = bert
        before = logits(model, batch)
        replace_modules(model, {WIDE: Doubled(model.get_submodule(WIDE))})
        assert not torch.allclose(logits(model, batch), before)

    def test_records_the_changed_paths_with_the_modules_that_were_there(self, bert):
        model, _ = bert
        old = model.get_submodule(QUERY)
        record = replace_modules(model, {QUERY: nn.Linear(32, 32)})
        assert list(record.originals) == [QUERY]
        assert record.originals[QUERY] is old

    @pytest.mark.parametrize("training", [True, False])
    def test_takes_over_the_training_flag_of_the_module_alone(self, bert, training):
        model, _ = bert
        model.train(not training)
        model.get_submodule(QUERY).train(training)
        new = nn.Sequential(nn.Linear(32, 32), nn.Dropout())
        replace_modules(model, {QUERY: new.train(not training)})
        assert all(module.training is training for module in new.modules())
        assert model.training is not training

    def test_reaches_what_modules_keep_besides_their_submodules(self):
        """In lists, tuples and dictionaries, which their forward may call (MaskFormer's does)."""

        class Keeper(nn.Module):
            def __init__(self):
                super().__init__()
                self.steps = [nn.Linear(4, 4), [nn.Linear(4, 4)], nn.ReLU()]
                self.pair = (nn.Linear(4, 4), "text")
                self.named = {"last": nn.Linear(4, 4)}
                self.layers = nn.ModuleList([self.steps[0], self.steps[1][0], self.pair[0], self.named["last"]])

            def called(self):
                return [self.steps[0], self.steps[1][0], self.pair[0], self.named["last"]]

        model = Keeper()
        old = model.called()
        new = {f"layers.{place}": nn.Linear(4, 4) for place in range(4)}
        record = replace_modules(model, new)
        assert all(one is other for one, other in zip(model.called(), new.values(), strict=True))
        assert model.pair[1] == "text"
        record.undo()
        assert all(one is other for one, other in zip(model.called(), old, strict=True))
        with in_place(model, new):
            assert model.called() == [*model.layers] == [*new.values()]
        assert model.called() == [*model.layers] == old

    def test_of_nothing_changes_nothing(self, bert):
        model, _ = bert
        before = identities(model)
        replace_modules(model, {}).undo()
        assert identities(model) == before

    def test_under_an_unknown_name_leaves_the_model_untouched(self, bert):
        model, _ = bert
        before = identities(model)
        new = nn.Linear(32, 32).train()
        with pytest.raises(TargetError, match=r"BertForSequenceClassification has no module 'bert\.nowhere'\."):
            replace_modules(model, {QUERY: new, "bert.nowhere": nn.Linear(1, 1)})
        assert identities(model) == before
        assert new.training

    def test_that_is_interrupted_halfway_leaves_the_model_untouched(self, bert, monkeypatch):
        model, _ = bert
        before = identities(model)
        put = model.set_submodule

        def interrupted(path, module):
            if path == WIDE and module is second:
                raise KeyboardInterrupt
            put(path, module)

        second = nn.Linear(32, 48)
        monkeypatch.setattr(model, "set_submodule", interrupted)
        with pytest.raises(KeyboardInterrupt):
            replace_modules(model, {QUERY: nn.Linear(32, 32), WIDE: second})
        assert identities(model) == before


class TestSharedModules:
    @pytest.fixture
    def shared(self, bert):
        """BERT whose second layer has the first one's query, under a path of its own."""
        model, batch = bert
        second = QUERY.replace("layer.0", "layer.1")
        model.set_submodule(second, model.get_submodule(QUERY))
        return model, batch, [QUERY, second]

    @pytest.mark.parametrize("asked", [0, 1])
    def test_are_replaced_at_every_path_by_one_module(self, shared, asked):
        model, _, both = shared
        new = nn.Linear(32, 32)
        record = replace_modules(model, {both[asked]: new})
        assert list(record.originals) == both
        assert all(model.get_submodule(path) is new for path in both)

    def test_inside_a_shared_parent_are_replaced_at_every_path(self, bert):
        model, _ = bert
        model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
        new = nn.Linear(32, 32)
        record = replace_modules(model, {QUERY: new})
        assert list(record.originals) == [QUERY, QUERY.replace("layer.0", "layer.1")]
        assert all(model.get_submodule(path) is new for path in record.originals)

    def test_are_all_restored(self, shared):
        model, _, both = shared
        before = identities(model)
        replace_modules(model, {both[1]: nn.Linear(32, 32)}).undo()
        assert identities(model) == before

    def test_called_several_times_are_replaced_in_each_call(self):
        model, batch = albert()
        name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
        calls = []
        new = Doubled(model.get_submodule(name))
        new.register_forward_hook(lambda *_: calls.append(1))
        replace_modules(model, {name: new})
        logits(model, batch)
        assert len(calls) == model.config.num_hidden_layers


class TestUndo:
    def test_restores_the_identity_of_every_module(self, bert):
        model, _ = bert
        before = identities(model)
        record = replace_modules(
            model, {QUERY: nn.Linear(32, 32), WIDE: nn.Linear(32, 48), "classifier": nn.Identity()}
        )
        assert identities(model) != before
        record.undo()
        assert identities(model) == before

    def test_restores_the_outputs_exactly(self, bert):
        model, batch = bert
        before = logits(model, batch)
        replace_modules(model, {WIDE: Doubled(model.get_submodule(WIDE))}).undo()
        assert torch.equal(logits(model, batch), before)

    def test_restores_the_order_of_the_parameters(self, bert):
        model, _ = bert
        before = [(name, id(p)) for name, p in model.named_parameters()]
        replace_modules(model, {QUERY: nn.Linear(32, 32)}).undo()
        assert [(name, id(p)) for name, p in model.named_parameters()] == before

    def test_leaves_a_later_change_elsewhere_in_place(self, bert):
        model, _ = bert
        record = replace_modules(model, {QUERY: nn.Linear(32, 32)})
        model.classifier = later = nn.Linear(32, 3)
        record.undo()
        assert model.classifier is later

    def test_follows_the_model_to_another_dtype(self, bert):
        model, batch = bert
        record = replace_modules(model, {QUERY: nn.Linear(32, 32)})
        model.to(torch.bfloat16)
        record.undo()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert logits(model, batch).dtype == torch.bfloat16

    def test_twice_is_the_same_as_once(self, bert):
        model, _ = bert
        before = identities(model)
        record = replace_modules(model, {QUERY: nn.Linear(32, 32)})
        record.undo()
        record.undo()
        assert identities(model) == before


def test_a_body_that_is_collected_late_undoes_nothing_of_what_came_since(bert):
    """As an interrupt leaves it whose traceback is kept: suspended, until it is collected."""
    name = "bert.encoder.layer.0.attention.self.query"
    model, _ = bert
    original, later = model.get_submodule(name), nn.Linear(32, 32)
    body = in_place(model, {name: nn.Linear(32, 32)})
    body.__enter__()
    model.set_submodule(name, original)  # what restores a model after an interrupt
    model.set_submodule(name, later)  # and the next try
    body.gen.close()
    assert model.get_submodule(name) is later


def test_a_body_that_ends_puts_the_originals_back(bert):
    name = "bert.encoder.layer.0.attention.self.query"
    model, _ = bert
    original = model.get_submodule(name)
    with in_place(model, {name: nn.Linear(32, 32)}):
        assert model.get_submodule(name) is not original
    assert model.get_submodule(name) is original


class TestTurns:
    def test_put_layers_in_and_back_as_often_as_asked_for(self, bert):
        model, batch = bert
        before, expected = identities(model), logits(model, batch)
        new = {WIDE: Doubled(model.get_submodule(WIDE)), QUERY: nn.Linear(32, 32)}
        with in_place(model, new):
            there, found = identities(model), logits(model, batch)
        turn = taking_turns(model, new)
        for _ in range(3):
            assert identities(model) == before
            assert torch.equal(logits(model, batch), expected)
            with turn():
                assert identities(model) == there
                assert torch.equal(logits(model, batch), found)
        assert identities(model) == before

    def test_look_for_the_places_once(self, bert, monkeypatch):
        model, _ = bert
        new = nn.Linear(32, 32)
        turn = taking_turns(model, {QUERY: new})
        monkeypatch.setattr(nn.Module, "named_modules", None)
        with turn():
            assert model.get_submodule(QUERY) is new

    def test_reach_shared_modules_and_what_is_kept_in_lists(self):
        model = nn.Module()
        model.first = nn.Linear(4, 4)
        model.again = nn.ModuleList([model.first])
        model.kept = [model.first, (model.first, "text")]
        old, new = model.first, nn.Linear(4, 4)
        turn = taking_turns(model, {"first": new})
        with turn():
            assert [model.first, model.again[0], model.kept[0], model.kept[1][0]] == [new] * 4
        assert [model.first, model.again[0], model.kept[0], model.kept[1][0]] == [old] * 4

    @pytest.mark.parametrize("training", [True, False])
    def test_have_the_training_flag_of_the_module(self, bert, training):
        model, _ = bert
        model.get_submodule(QUERY).train(training)
        new = nn.Linear(32, 32).train(not training)
        with taking_turns(model, {QUERY: new})():
            assert new.training is training

    def test_under_an_unknown_name_are_refused(self, bert):
        with pytest.raises(TargetError, match="has no module 'nowhere'"):
            taking_turns(bert[0], {"nowhere": nn.Linear(1, 1)})

    def test_are_over_after_an_interrupt(self, bert):
        model, _ = bert
        before, turn = identities(model), taking_turns(model, {QUERY: nn.Linear(32, 32), WIDE: nn.Linear(32, 48)})
        with pytest.raises(KeyboardInterrupt), turn():
            raise KeyboardInterrupt
        assert identities(model) == before

    def test_that_are_collected_late_undo_nothing_of_what_came_since(self, bert):
        model, _ = bert
        later, body = nn.Linear(32, 32), taking_turns(model, {QUERY: nn.Linear(32, 32)})()
        body.__enter__()
        model.set_submodule(QUERY, later)
        body.gen.close()
        assert model.get_submodule(QUERY) is later
