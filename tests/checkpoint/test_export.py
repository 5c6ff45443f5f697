"""Compressed models leave PyTorch's eager mode, and PyTorch: compiled, exported, as ONNX, with the same answers."""

import math
from types import SimpleNamespace

import pytest
import torch
from support.compressions import auto_class, build, compressed, factorized_layers
from support.mixtures import mixture, words
from support.tiny_models import rows
from support.tolerances import FLOAT32

from hf_lossless_lr.layers import in_place, unfuse

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

INPUTS = ("input_ids", "attention_mask", "pixel_values")
CASES = {  # kinds of models and forms of layers: model, options of the compression
    "encoder with pivots": ("bert-sequence-classification", {"storage": "pivoted"}),
    "decoder with two factors": ("llama", {"storage": "two-factor"}),
    "convolutions with pivots": ("resnet", {"storage": "pivoted"}),
    "convolutions of both forms": ("resnet", {"storage": "two-factor"}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A compressed model as it is loaded, its exported program, and two batches of different sizes."""
    name, options = CASES[request.param]
    model, batch = compressed(name, **options)
    if request.param == "convolutions of both forms":
        assert {layer.form for layer in factorized_layers(model).values()} == {"channel", "spatial"}
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    model = auto_class(name).from_pretrained(folder).eval().requires_grad_(False)
    model.config.use_cache = False
    inputs = {key: value for key, value in batch.items() if key in INPUTS}
    batches = rows(inputs, slice(4)), rows(inputs, slice(4, 9))
    shapes = any_number_of_examples(inputs)
    program = torch.export.export(model, (), kwargs=batches[0], dynamic_shapes=shapes, strict=False)
    return SimpleNamespace(name=name, model=model, program=program, inputs=batches[0], others=batches[1])


def any_number_of_examples(inputs):
    return {name: {0: torch.export.Dim.DYNAMIC} for name in inputs}


def check_same(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=FLOAT32 * float(expected.abs().max()), rtol=0)


def test_a_compiled_model_answers_the_same(case):
    """As one graph; what is made of the graph does not depend on where it came from."""
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="eager")
    check_same(compiled(**case.inputs).logits, case.model(**case.inputs).logits)


def test_an_exported_program_answers_the_same_for_another_number_of_examples(case):
    check_same(case.program.module()(**case.others).logits, case.model(**case.others).logits)


def test_an_onnx_file_answers_the_same_and_holds_the_factors(case, tmp_path):
    file = tmp_path / "model.onnx"
    torch.onnx.export(case.program, f=file, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {each.name: case.others[each.name].numpy() for each in session.get_inputs()})
    check_same(found[0], case.model(**case.others).logits)
    held = sum(math.prod(tensor.dims) for tensor in onnx.load(file).graph.initializer)
    dense = sum(parameter.numel() for parameter in build(case.name)[0].parameters())
    assert held < 0.85 * dense


def exported(family, strict=False):
    """A mixture with experts of their own as an exported program, a batch of another size, and its answers."""
    model, batch, others = mixture(family).requires_grad_(False), words(4), words(9, seed=1)
    batch, others = ({"input_ids": each["input_ids"]} for each in (batch, others))
    model.config.use_cache = False
    experts = unfuse(model)
    if not experts:
        pytest.skip("this version of Transformers keeps its experts in another form")
    shapes = any_number_of_examples(batch)
    with in_place(model, experts):
        program = torch.export.export(model, (), kwargs=batch, dynamic_shapes=shapes, strict=strict)
    return program, others, model(**others).logits


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects.*_active_collector:UserWarning")
@pytest.mark.parametrize(
    ("family", "strict"), [("Mixtral", False), ("Mixtral", True), ("GptOss", False), ("Llama4", False)]
)
def test_experts_are_exported_for_any_rows_and_routes(family, strict):
    """Each of the three hands rows to its experts, or keeps their weights, in a way of its own."""
    program, others, expected = exported(family, strict)
    check_same(program.module()(**others).logits, expected)


def test_an_onnx_file_of_experts_answers_the_same(tmp_path):
    program, others, expected = exported("Mixtral")
    torch.onnx.export(program, f=tmp_path / "model.onnx", external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    check_same(session.run(None, {"input_ids": others["input_ids"].numpy()})[0], expected)


def test_the_exporter_of_transformers_writes_a_file_that_answers_the_same(tmp_path):
    exporters = pytest.importorskip("transformers.exporters")
    model, batch = compressed("bert-sequence-classification")
    inputs = {name: value for name, value in batch.items() if name in INPUTS}
    shapes = any_number_of_examples(inputs)
    config = exporters.OnnxConfig(dynamic=True, dynamic_shapes=shapes)
    exporters.OnnxExporter().export(model, inputs, config=config).save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {each.name: inputs[each.name].numpy() for each in session.get_inputs()})
    with torch.no_grad():
        check_same(found[0], model(**inputs).logits)
