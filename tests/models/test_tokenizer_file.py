"""A tokenizer that would take all memory is refused before it is opened, or ends a process that is not ours."""

import base64
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import golden
from npu_proxy import Engine, InputError, ModelError, Settings
from npu_proxy.engine.encode_options import EncodeOptions
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models import tokenizer_file
from npu_proxy.models.layout import read_spec
from npu_proxy.models.tokenizer_file import check_growth, open_tokenizer
from npu_proxy.spec import TokenizerSource

PLAIN: Mapping[str, Any] = json.loads((golden("mean")[0] / "tokenizer.json").read_text())


def replacing(content: str, text: str | None = "a") -> Mapping[str, Any]:
    pattern = {"Regex": "a*"} if text is None else {"String": text}
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "Sequence", "normalizers": parts}


def template(single: list[Any], ids: list[int]) -> Mapping[str, Any]:
    whole = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    special = {"[CLS]": {"id": "[CLS]", "ids": ids, "tokens": ["[CLS]"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": single, "pair": whole, "special_tokens": special}


TEXT, MARK = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[CLS]", "type_id": 0}}


def source(file: Path) -> TokenizerSource:
    return TokenizerSource(files=[file])


def written(folder: Path, **parts: Any) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**PLAIN, **parts}))
    return file


def charsmap(text: str) -> Mapping[str, Any]:
    """Sentencepiece's table with an empty trie and this replacement."""
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4) + text.encode() + b"\0").decode()}


LONG = "z" * 1001


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": sequence(*[replacing("a" * 100)] * 5)}, "replacing makes up to 1e.10 characters of one"),
        ({"normalizer": replacing("b" * 100, None)}, "replacing makes up to 101 characters of one"),
        ({"normalizer": replacing("b" * 100, "")}, "replacing makes up to 101 characters of one"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 100}}, "replacing makes up to 101 characters of one"),
        ({"normalizer": sequence(*[replacing("aa", None)] * 5)}, "replacing makes up to 243 characters"),
        ({"normalizer": sequence(sequence(sequence(replacing("a" * 9), replacing("a" * 9))))}, "up to 81 characters"),
        ({"decoder": replacing("a" * 100)}, "replacing makes up to 100 characters of one"),
        ({"post_processor": template([MARK, TEXT], [2] * 2000)}, "adds 2000 tokens"),
        ({"post_processor": template([*[MARK] * 50, TEXT], [2] * 50)}, "adds 2500 tokens"),
        ({"post_processor": template([TEXT] * 100, [2])}, "a template repeats the text"),
        ({"model": {**PLAIN["model"], "max_input_chars_per_word": 10**9}}, "max_input_chars_per_word is 1000000000"),
        ({"model": {**PLAIN["model"], "max_input_chars_per_word": 201}}, "max_input_chars_per_word is 201"),
        ({"normalizer": charsmap("b" * 100)}, "replacing makes up to 100 characters of one"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, "the table of characters is cut"),
        ({"model": {**PLAIN["model"], "unk_token": LONG}}, "length <= 1000"),
        ({"model": {**PLAIN["model"], "vocab": {LONG: 1}}}, "length <= 1000"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [[LONG, 0.0]]}}, "length <= 1000"),
        ({"added_tokens": [{"id": 1, "content": LONG}]}, "length <= 1000"),
        ({"normalizer": 7}, "is not what the tokenizers library writes"),
        ({"normalizer": {"type": "Replace"}}, "is not what the tokenizers library writes"),
        ({"post_processor": {"type": "TemplateProcessing", "single": 7}}, "is not what the tokenizers library writes"),
    ],
)
def test_what_multiplies_a_text_is_refused(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_tokenizer(source(written(tmp_path, **parts)))


def test_usual_normalizers_are_not_growth(tmp_path: Path) -> None:
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    quotes = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
    parts = sequence(quotes, {"type": "NFKD"}, charsmap("صلى الله عليه وسلم"), spaces)
    assert check_growth(written(tmp_path, normalizer=parts).read_bytes()) == 2


def test_the_limit_of_characters_counts_what_a_normalizer_makes_of_them(tmp_path: Path) -> None:
    spec = read_spec(golden("mean")[0])
    written(tmp_path, normalizer=replacing("b" * 64), pre_tokenizer={"type": "Whitespace"})
    tokenizer = RequestTokenizer(replace(spec, tokenizer=source(tmp_path / "tokenizer.json")))
    (error,) = tokenizer.encode(["a" * 62_501], EncodeOptions(limit=64))
    assert isinstance(error, InputError)
    assert "62,500 characters" in str(error)


def test_a_tokenizer_that_takes_too_much_memory_ends_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no check foresees: the limit is set so low here that any tokenizer exceeds it."""
    monkeypatch.setattr(tokenizer_file, "_TRIAL_BYTES", 20 << 20)
    with pytest.raises(ModelError, match=r"tokenizer.json: encoding a few texts within \d+ MB of memory failed"):
        open_tokenizer(source(written(tmp_path)))


def test_a_pattern_that_runs_away_is_an_error_of_that_text(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(golden("mean")[0], folder)
    pattern = {"type": "Split", "pattern": {"Regex": "(x+)+$"}, "behavior": "Isolated", "invert": False}
    both = {"type": "Sequence", "pretokenizers": [pattern, {"type": "Whitespace"}]}
    written(folder, pre_tokenizer=both)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with Engine(folder, settings=Settings(cache_mb=0)) as engine:
        (result,) = engine.results(["the cat", "x" * 40 + "y", "a dog"])
    assert result.errors[0] is None
    assert result.errors[2] is None
    assert isinstance(result.errors[1], InputError)
    assert "tokenizer cannot process this text" in str(result.errors[1])
