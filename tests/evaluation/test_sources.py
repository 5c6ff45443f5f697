"""Data for the command line: each task's examples, the choice of columns, and where a data set comes from."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from support.tiny_models import IGNORED
from support.word_tokenizer import CLS, PAD, SEP, UNKNOWN, word_tokenizer
from torch import nn
from transformers import ViTImageProcessorPil

from hf_lossless_lr.errors import DataError
from hf_lossless_lr.evaluation.pipelines import TASKS
from hf_lossless_lr.evaluation.sources import choose_columns, load_split


def prepare(name, data, columns, max_length=128, processor=None):
    dataset = Dataset.from_dict(data) if isinstance(data, dict) else data
    return TASKS[name].prepare(dataset, processor or word_tokenizer(), max_length, columns)


class TestTextClassification:
    def test_tokenizes_the_text_and_keeps_the_label_alone(self):
        data = {"idx": [7, 8], "sentence": ["w5 w6", "w7 nonsense w9"], "label": [1, 0]}
        examples = prepare("text-classification", data, ["sentence", "label"])
        assert examples["input_ids"] == [[CLS, 5, 6, SEP], [CLS, 7, UNKNOWN, 9, SEP]]
        assert examples["attention_mask"] == [[1] * 4, [1] * 5]
        assert examples["labels"] == [1, 0]
        assert not {"idx", "sentence", "label"} & set(examples.column_names)

    def test_joins_a_pair_of_texts(self):
        data = {"premise": ["w5 w6"], "hypothesis": ["w7"], "label": [2]}
        examples = prepare("text-classification", data, ["premise", "hypothesis", "label"])
        assert examples["input_ids"] == [[CLS, 5, 6, SEP, 7, SEP]]

    def test_cuts_a_long_text(self):
        examples = prepare("text-classification", {"text": ["w5 w6 w7 w8 w9"], "label": [0]}, ["text", "label"], 4)
        assert examples["input_ids"] == [[CLS, 5, 6, SEP]]

    def test_pads_in_the_collator(self):
        examples = prepare("text-classification", {"text": ["w5", "w6 w7"], "label": [0, 1]}, ["text", "label"])
        batch = TASKS["text-classification"].collator(word_tokenizer())(list(examples))
        assert batch["input_ids"].tolist() == [[CLS, 5, SEP, PAD], [CLS, 6, 7, SEP]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
        assert batch["labels"].tolist() == [0, 1]


class TestTokenClassification:
    def test_labels_the_first_piece_of_each_word_alone(self):
        data = {"tokens": [["w5-w6-w7", "w8"], ["w9"]], "ner_tags": [[3, 4], [1]]}
        examples = prepare("token-classification", data, ["tokens", "ner_tags"])
        assert examples["input_ids"] == [[CLS, 5, 6, 7, 8, SEP], [CLS, 9, SEP]]
        assert examples["labels"] == [[IGNORED, 3, IGNORED, IGNORED, 4, IGNORED], [IGNORED, 1, IGNORED]]
        assert not {"tokens", "ner_tags"} & set(examples.column_names)

    def test_cuts_the_labels_with_the_text(self):
        data = {"words": [["w5", "w6", "w7"]], "tags": [[1, 2, 3]]}
        examples = prepare("token-classification", data, ["words", "tags"], 4)
        assert examples["input_ids"] == [[CLS, 5, 6, SEP]]
        assert examples["labels"] == [[IGNORED, 1, 2, IGNORED]]

    def test_pads_labels_as_ignored_in_the_collator(self):
        data = {"tokens": [["w5"], ["w6", "w7"]], "tags": [[1], [2, 3]]}
        examples = prepare("token-classification", data, ["tokens", "tags"])
        batch = TASKS["token-classification"].collator(word_tokenizer())(list(examples))
        assert batch["labels"].tolist() == [[IGNORED, 1, IGNORED, IGNORED], [IGNORED, 2, 3, IGNORED]]


WRONG_ROWS = {
    "no text": (
        "text-classification",
        {"text": ["w5", None], "label": [0, 1]},
        "row 1 of the data set has the text None",
    ),
    "no second text": (
        "text-classification",
        {"sentence1": ["w5"], "sentence2": [None], "label": [0]},
        "row 0 of the",
    ),
    "no text to go on": (
        "text-generation",
        {"text": ["w5", None]},
        "row 1 of the data set has the text None in 'text'",
    ),
    "too few tags": ("token-classification", {"tokens": [["w5", "w6"]], "tags": [[1]]}, "row 0 .* 2 words and 1 tags"),
    "no tags": (
        "token-classification",
        {"tokens": [["w5"]] * 2, "tags": [[1], None]},
        "row 1 .* 1 words and the tags N",
    ),
    "a text": ("token-classification", {"tokens": ["w5 w6"], "tags": [[1]]}, "row 0 .* 'w5 w6|w5 w6 in 'tokens'"),
    "no words": ("token-classification", {"tokens": [["w5"], None], "tags": [[1], []]}, "row 1 .* None in 'tokens'"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_a_row_that_cannot_be_read_is_named(case):
    name, data, text = WRONG_ROWS[case]
    with pytest.raises(DataError, match=text):
        prepare(name, data, None)


def test_names_of_tags_stay_names():
    data = {"tokens": [["w5-w6", "w7"]], "tags": [["B-X", "O"]]}
    examples = prepare("token-classification", data, ["tokens", "tags"])
    assert next(iter(examples))["labels"] == [IGNORED, "B-X", IGNORED, "O", IGNORED]


class TestTextGeneration:
    def test_joins_the_texts_and_cuts_them_into_blocks(self):
        data = {"text": ["w5 w6 w7", "", "w8 w9", "w10 w11"]}
        examples = prepare("text-generation", data, ["text"], 3)
        assert examples["input_ids"] == [[5, 6, 7], [8, 9, 10]]
        assert examples["labels"] == examples["input_ids"]
        assert set(examples.column_names) == {"input_ids", "labels"}

    def test_ends_each_text_with_the_end_token_if_there_is_one(self):
        data = {"text": ["w5 w6", "w7"]}
        examples = prepare("text-generation", data, ["text"], 5, word_tokenizer(eos=True))
        assert examples["input_ids"] == [[5, 6, SEP, 7, SEP]]

    def test_keeps_a_last_block_that_is_complete(self):
        assert len(prepare("text-generation", {"text": ["w5 w6 w7 w8"]}, ["text"], 2)) == 2

    def test_of_too_little_text_gives_no_example(self):
        assert len(prepare("text-generation", {"text": ["w5"]}, ["text"], 2)) == 0


def pictures():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colour = np.stack([grey, grey + 64, grey + 128], -1)
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": [grey, colour], "label": [3, 1]}, features=features)


class TestImageClassification:
    def test_gives_pixels_of_three_channels_and_the_label(self):
        processor = ViTImageProcessorPil(size={"height": 12, "width": 12})
        examples = prepare("image-classification", pictures(), ["image", "label"], processor=processor)
        pixels = torch.tensor(examples["pixel_values"])
        assert pixels.shape == (2, 3, 12, 12)
        assert torch.equal(pixels[0, 0], pixels[0, 2])
        assert not torch.equal(pixels[1, 0], pixels[1, 2])
        expected = processor([picture.convert("RGB") for picture in pictures()["image"]], return_tensors="pt")
        assert torch.equal(pixels, expected["pixel_values"])
        assert examples["labels"] == [3, 1]

    def test_is_collated_as_it_is(self):
        processor = ViTImageProcessorPil(size={"height": 12, "width": 12})
        examples = prepare("image-classification", pictures(), ["image", "label"], processor=processor)
        batch = TASKS["image-classification"].collator(processor)(list(examples))
        assert batch["pixel_values"].shape == (2, 3, 12, 12)
        assert nn.functional.one_hot(batch["labels"]).shape == (2, 4)


COLUMNS = {  # task, columns of the data set, those chosen
    "sst2": ("text-classification", ["sentence", "label", "idx"], ["sentence", "label"]),
    "imdb": ("text-classification", ["text", "label"], ["text", "label"]),
    "mnli": ("text-classification", ["premise", "hypothesis", "label", "idx"], ["premise", "hypothesis", "label"]),
    "mrpc": ("text-classification", ["sentence1", "sentence2", "label", "idx"], ["sentence1", "sentence2", "label"]),
    "qqp": ("text-classification", ["question1", "question2", "label", "idx"], ["question1", "question2", "label"]),
    "conll2003": ("token-classification", ["id", "tokens", "pos_tags", "ner_tags"], ["tokens", "ner_tags"]),
    "wikitext": ("text-generation", ["text"], ["text"]),
    "mnist": ("image-classification", ["image", "label"], ["image", "label"]),
    "cifar10": ("image-classification", ["img", "label"], ["img", "label"]),
}


class TestColumns:
    @pytest.mark.parametrize("case", COLUMNS)
    def test_of_well_known_data_sets_are_found(self, case):
        task, available, chosen = COLUMNS[case]
        assert choose_columns(TASKS[task], available) == chosen

    def test_that_the_user_names_are_taken_in_that_order(self):
        columns = choose_columns(TASKS["text-classification"], ["label", "b", "a"], ["a", "b", "label"])
        assert columns == ["a", "b", "label"]

    def test_that_do_not_exist_are_an_error(self):
        with pytest.raises(DataError, match="the data set has no column 'txt'; it has text, label"):
            choose_columns(TASKS["text-classification"], ["text", "label"], ["txt", "label"])

    def test_of_unusual_names_have_to_be_named(self):
        text = (
            "none of the columns label, labels; it has text, target. Name the columns with --columns, the label last"
        )
        with pytest.raises(DataError, match=text):
            choose_columns(TASKS["text-classification"], ["text", "target"])
        with pytest.raises(DataError, match="none of the columns image, img; it has picture"):
            choose_columns(TASKS["image-classification"], ["picture"])


ROWS = [{"text": f"w{number}", "label": number % 2} for number in range(5, 15)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class TestLoading:
    def test_reads_files_of_a_format(self, tmp_path):
        file = write_lines(tmp_path / "a.jsonl", ROWS)
        assert load_split("json", None, file, "train", None).to_list() == ROWS

    def test_reads_several_files(self, tmp_path):
        files = [write_lines(tmp_path / f"{part}.jsonl", ROWS[part * 5 : part * 5 + 5]) for part in range(2)]
        assert load_split("json", None, files, "validation", None).to_list() == ROWS

    def test_reads_a_split_of_a_folder(self, tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir()
        write_lines(folder / "train.jsonl", ROWS[:6])
        write_lines(folder / "test.jsonl", ROWS[6:])
        assert load_split(str(folder), None, None, "test", None).to_list() == ROWS[6:]

    def test_reads_what_was_saved_to_disk(self, tmp_path):
        Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
        assert load_split(str(tmp_path / "one"), None, None, "train", None).to_list() == ROWS
        splits = DatasetDict({"train": Dataset.from_list(ROWS[:4]), "dev": Dataset.from_list(ROWS[4:])})
        splits.save_to_disk(str(tmp_path / "two"))
        assert load_split(str(tmp_path / "two"), None, None, "dev", None).to_list() == ROWS[4:]

    @pytest.mark.parametrize(("examples", "count"), [(None, 10), (3, 3), (100, 10)])
    def test_takes_examples_from_the_start(self, tmp_path, examples, count):
        file = write_lines(tmp_path / "a.jsonl", ROWS)
        assert load_split("json", None, file, "train", examples).to_list() == ROWS[:count]

    def test_keeps_lists(self, tmp_path):
        rows = [{"tokens": ["w5", "w6"], "tags": [1, 2]}]
        dataset = load_split("json", None, write_lines(tmp_path / "a.jsonl", rows), "train", None)
        assert dataset.to_list() == rows


class TestRefusal:
    def test_of_a_split_that_does_not_exist_lists_those_that_do(self, tmp_path):
        DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path))
        with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
            load_split(str(tmp_path), None, None, "dev", None)

    def test_of_a_file_that_does_not_exist_names_it(self, tmp_path):
        with pytest.raises(DataError, match=r"cannot load the data set 'json': Unable to find .*nothing\.jsonl"):
            load_split("json", None, str(tmp_path / "nothing.jsonl"), "train", None)

    def test_of_a_broken_file_says_what_is_wrong_with_it(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
        with pytest.raises(DataError, match="cannot load the data set 'json': JSON parse error"):
            load_split("json", None, str(tmp_path / "a.jsonl"), "train", None)

    def test_of_a_folder_that_does_not_exist_or_is_empty(self, tmp_path):
        for folder, text in (
            (tmp_path / "nowhere", "Couldn't find any data file"),
            (tmp_path, "contain any data file"),
        ):
            with pytest.raises(DataError, match=f"cannot load the data set '{folder}': .*{text}"):
                load_split(str(folder), None, None, "train", None)

    def test_of_an_unknown_configuration_names_it(self, tmp_path):
        write_lines(tmp_path / "train.jsonl", ROWS)
        with pytest.raises(DataError, match="BuilderConfig 'large' not found"):
            load_split(str(tmp_path), "large", None, "train", None)

    @pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, ValueError])
    def test_of_a_data_set_of_the_hub_that_cannot_be_had(self, error, monkeypatch):
        def fail(*_, **__):
            raise error("Couldn't reach it")

        monkeypatch.setattr("hf_lossless_lr.evaluation.sources.load_dataset", fail)
        with pytest.raises(DataError, match="cannot load the data set 'nobody/nothing': Couldn't reach it"):
            load_split("nobody/nothing", None, None, "train", None)


@pytest.mark.parametrize("name", ["json", "csv", "parquet", "text", "arrow", "imagefolder"])
@pytest.mark.parametrize("files", [None, []])
def test_a_format_without_files_is_refused_whatever_lies_in_the_working_directory(name, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "w5", "label": 0}\n')
    (tmp_path / "train.csv").write_text("text,label\nw5,0\n")
    (tmp_path / "train.txt").write_text("w5\n")
    with pytest.raises(DataError, match=f"the data set '{name}' is a format; name its files"):
        load_split(name, None, files, "train", None)


@pytest.mark.parametrize("splits", [True, False])
def test_a_folder_of_pictures_by_class_is_read_with_splits_and_without(tmp_path, splits):
    """As ImageNet lies on a disk: `val` is what datasets calls `validation`."""
    image = pytest.importorskip("PIL.Image")
    for index, folder in enumerate(("n01", "n02", "n03")):
        place = tmp_path / "val" / folder if splits else tmp_path / folder
        place.mkdir(parents=True)
        image.new("RGB", (8, 8), (index, 0, 0)).save(place / "a.png")
    if splits:
        (tmp_path / "train" / "n01").mkdir(parents=True)
        image.new("RGB", (8, 8)).save(tmp_path / "train" / "n01" / "a.png")
    found = load_split(str(tmp_path), None, None, "validation", None)
    assert (found["label"], found.features["label"].names) == ([0, 1, 2], ["n01", "n02", "n03"])
    assert [picture.getpixel((0, 0))[0] for picture in found["image"]] == [0, 1, 2]
    if splits:
        with pytest.raises(DataError, match="has no split 'test'"):
            load_split(str(tmp_path), None, None, "test", None)
