"""Changes every key and tensor of the golden models, one at a time, and compares with the reference. Run by ``make mutations``.

A changed folder must give the vectors that its own library computes of it, or be refused by a message that names what was changed.
Prints what is neither, and counts the rest. Arguments: names of golden models (default: all). --most: mutations of each at most,
chosen at random. --seed.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "critical", "TQDM_DISABLE": "1"}
warnings.filterwarnings("ignore")

import logging  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from npu_proxy import Engine, NpuProxyError, Settings  # noqa: E402
from npu_proxy.prepare.compare import agrees, compare, load_reference  # noqa: E402
from npu_proxy.types import OutputType, Pair, TextInput  # noqa: E402

HERE = Path(__file__).parent
TEXTS = [
    "the cat sleeps",
    "A big RED house!",
    "x",
    "naïve 日本 zzqq",
    "the [MASK] [PAD] cat",
    "sea " * 60,
    "one two three four five " * 3,
]
OTHERS: dict[str, list[Any]] = {
    "hidden_act": ["relu", "quick_gelu"],
    "hidden_activation": ["silu"],
    "activation": ["relu"],
    "pooling_mode": ["max", "cls"],
    "activation_function": ["torch.nn.modules.activation.ReLU", "swiglu"],
    "activation_fn": ["torch.nn.modules.activation.Tanh"],
    "similarity_fn_name": ["dot", "dot_score"],
    "tokenizer_class": ["BertTokenizer", "PreTrainedTokenizerFast", "RobertaTokenizer"],
    "truncation_side": ["left"],
    "position_embedding_type": ["relative_key"],
    "model_type": ["bert", "roberta", "distilbert"],
    "rope_type": ["linear", "yarn"],
    "problem_type": ["regression"],
    "norm_rel_ebd": ["none"],
    "pooling_strategy": ["sum"],
    "type": ["sentence_transformers.models.Dropout", "my_code.Pooling"],
    "layer_types": [["full_attention"] * 3],
    "model_input_names": [["input_ids", "attention_mask"]],
    "unk_token": ["[PAD]"],
    "cls_token": ["cat"],
    "mask_token": ["[UNK]"],
}
"""Other legal values of texts and lists. Not of `dtype`, to which transformers rounds weights, and npu-proxy does not."""
FILES = ("*.json", "*/config.json", "artifact.metadata")
NO_REFERENCE = ("odd/projected_qwen",)
"""Only their own code, which is not in the folder, computes them."""
NOT_CHANGED = ("texts.json", "vocab.json")
VOCABULARY = (("model", "vocab"), ("model", "merges"))


def others(key: str, value: Any) -> list[Any]:
    """Other values: legal ones, then nonsense."""
    nonsense: list[Any] = ["nonsense", -1, None, []]
    if isinstance(value, bool):
        return [not value, *nonsense]
    if isinstance(value, int):
        return [value + 1, max(1, value // 2), *nonsense]
    if isinstance(value, float):
        return [value * 2 + 0.1, *nonsense]
    if value is None:
        return [True, 3, *OTHERS.get(key, []), "nonsense"]
    return [*OTHERS.get(key, []), *nonsense]


def paths(content: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all keys, also in objects inside."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if isinstance(content, dict):
            yield (*before, key)
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from paths(value, (*before, key))


Mutation = tuple[str, str, Callable[[Path], None]]
"""What is changed (shown), the name that a refusal must contain, and the change of a copied folder."""


def mutations(folder: Path) -> Iterator[Mutation]:
    for file in sorted({found for pattern in FILES for found in folder.glob(pattern)}):
        if file.name in NOT_CHANGED:
            continue
        name, content = file.relative_to(folder), json.loads(file.read_text(encoding="utf-8"))
        for path in paths(content):
            if path[:2] in VOCABULARY:
                continue
            yield f"{name}: {path} dropped", str(path[-1]), _json(name, path, drop=True)
            for value in others(str(path[-1]), _at(content, path)):
                yield f"{name}: {path} = {value!r}", str(path[-1]), _json(name, path, value)
        outer = content if isinstance(content, list) else [content]
        for index in range(len(outer)):
            place = (index,) if isinstance(content, list) else ()
            yield f"{name}: unknown key", "brand_new_switch", _json(name, (*place, "brand_new_switch"), True)
    for file in sorted(folder.rglob("*.safetensors")):
        name = file.relative_to(folder)
        for tensor in load_file(file):
            yield (
                f"{name}: {tensor} renamed",
                tensor.removesuffix(".weight").rsplit(".", 1)[-1],
                _tensor(name, tensor, f"{tensor}_other"),
            )
            yield f"{name}: {tensor} dropped", tensor.removesuffix(".weight").rsplit(".", 1)[-1], _tensor(name, tensor, None)
        yield f"{name}: unknown tensor", "brand_new", _tensor(name, "", "brand_new.weight")


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def _json(name: Path, path: tuple[Any, ...], value: Any = None, *, drop: bool = False) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        inner = _at(content, path[:-1])
        if drop:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return change


def _tensor(name: Path, old: str, new: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        tensor = tensors.pop(old, torch.ones(3))
        if new is not None:
            tensors[new] = tensor
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return change


def outcome(folder: Path, name: str, file: str) -> tuple[str, str]:
    """What becomes of a changed folder, and the details. name, file: what a refusal must contain one of.

    One of: equal, refused, refused without its name, reference fails, DIFFERENT.
    """
    try:
        engine = Engine(folder, settings=Settings(device="cpu", cache_mb=0, compile_cache_mb=0, on_empty="embed"))
        engine.start()
    except NpuProxyError as error:
        message = str(error)
        return ("refused" if name in message or file in message else "refused without its name"), message
    with engine:
        spec = engine.spec
        texts: list[TextInput] = [Pair("the cat", text) for text in TEXTS] if spec.output_type is OutputType.SCORES else [*TEXTS]
        try:
            reference = load_reference(spec)
        except Exception as error:
            return "reference fails", f"{type(error).__name__}: {error}"
        found = compare(engine, reference, texts)
    if all(one.error.startswith("reference:") for one in found):
        return "reference fails", found[0].error
    worst = [one for one in found if not agrees(one, spec) and not one.error.startswith("reference:")]
    return (
        ("DIFFERENT", f"{worst[0].text!r} {worst[0].cosine:.4f} {worst[0].difference:.3g} {worst[0].error}")
        if worst
        else ("equal", "")
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--most", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    folders = [*HERE.iterdir(), *(HERE / "odd").iterdir()]
    names = arguments.names or sorted(str(each.relative_to(HERE)) for each in folders if (each / "modules.json").exists())
    names = [name for name in names if name not in NO_REFERENCE]
    total: Counter[str] = Counter()
    for name in names:
        chosen = list(mutations(HERE / name))
        random.Random(arguments.seed).shuffle(chosen)
        counts: Counter[str] = Counter()
        for shown, expected, change in chosen[: arguments.most]:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "model"
                shutil.copytree(HERE / name, folder, ignore=shutil.ignore_patterns("onnx", "answers.npz", "vectors.npy"))
                change(folder)
                what, details = outcome(folder, expected, shown.split(": ")[0])
            counts[what] += 1
            if arguments.verbose or what in ("DIFFERENT", "refused without its name", "reference fails"):
                print(f"  {name} {what}: {shown}: {details[:230]!r}", flush=True)
        print(name, dict(counts), flush=True)
        total += counts
    print("all", sum(total.values()), dict(total))


if __name__ == "__main__":
    main()
