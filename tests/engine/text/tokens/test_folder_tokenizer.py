"""A folder's ids are those of transformers: the file, the class that a file names, the flags of special tokens."""

import itertools
import json
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from engine.errors import ModelLoadError
from engine.text.tokens.tokenizer_class import CLASS_TOKENS, FILE_CLASS, OTHER_CLASSES, choose_class
from tests.checkpoints.tokenizer_packages import FOLDERS, TokenizerPackage, package_folder
from tests.checkpoints.tokenizers import (
    SENTENCES,
    as_model_type,
    byte_level_tokenizer,
    compare,
    our_tokenizer,
    random_folder,
    sentencepiece_tokenizer,
    their_tokenizer,
)

BUILDERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "bytes": lambda: byte_level_tokenizer(ignore_merges=True, add_prefix_space=True),
    "sentencepiece": sentencepiece_tokenizer,
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ``tokenizer.json`` of each kind, with the special tokens that classes name."""
    folders = {}
    for kind, build in BUILDERS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        hf = build()
        named = {text for tokens in CLASS_TOKENS.values() for text in tokens.values()}
        hf.add_special_tokens(sorted(named - {"<FILL_ME>"}))  # transformers' Code Llama splits texts at that one
        hf.post_processor = tokenizers.processors.TemplateProcessing(
            "<s> $A", "<s> $A <s> $B", [("<s>", hf.token_to_id("<s>"))]
        )
        hf.save(str(folders[kind] / "tokenizer.json"))
    return folders


@pytest.fixture
def folder(kinds: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the byte-level one."""
    shutil.copy(kinds["bytes"] / "tokenizer.json", tmp_path)
    return tmp_path


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value))


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"legacy": True, "add_prefix_space": False, "add_bos_token": False},
    {"legacy": True, "add_prefix_space": True, "add_eos_token": True, "unk_token": "<unk>", "bos_token": None},
)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_a_class_that_builds_its_own_gives_the_ids_of_transformers(
    kinds: dict[str, Path], kind: str, name: str
) -> None:
    for options in OPTIONS:
        with as_model_type(kinds[kind], None, tokenizer_class=name, **options) as folder:
            row = compare(name, folder, random_count=15)
            assert row.equal == row.total > 25, row.line()
            # A byte-level file of a Llama class is read as it is: the class would drop its bytes.
            kept = kind == "bytes" and name == "LlamaTokenizer"
            assert row.tokenizer_class.startswith(FILE_CLASS if kept else name)


def test_a_class_may_change_the_ids_of_the_file(kinds: dict[str, Path]) -> None:
    text = "1111  a\u0300 \u0301DON'T"
    ids = set()
    for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"):
        with as_model_type(kinds["bytes"], None, tokenizer_class=name) as folder:
            ids.add(tuple(our_tokenizer(folder).encode(text)))
    assert len(ids) == 3


def theirs(name: str) -> str:
    """The class that transformers finds by name, by our names for the outcomes."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = tokenizer_class_from_name(name)
    return FILE_CLASS if found is None or found.__name__ == "PythonBackend" else str(found.__name__)


HUB_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast", "Unknown", None)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "qwen3_5", "cohere2", "phi3", "x", None])
def test_the_class_is_the_one_that_transformers_takes(kinds: dict[str, Path], model_type: str | None) -> None:
    for name, kind in itertools.product(HUB_CLASSES, BUILDERS):
        with as_model_type(kinds[kind], model_type, tokenizer_class=name) as folder:
            taken = our_tokenizer(folder).sources["class"].split(" ")[0]
            assert taken == theirs(type(their_tokenizer(folder)).__name__), (name, kind)


def test_a_class_of_the_models_own_code_is_not_looked_up_for_a_known_model() -> None:
    own = {"auto_map": {"AutoTokenizer": ["file.Own", None]}, "tokenizer_class": "Own"}
    assert choose_class({"model_type": "qwen3"}, own, byte_level=True).name == FILE_CLASS
    assert choose_class({"model_type": "qwen3"}, {}, byte_level=True).name == "Qwen2Tokenizer"
    assert choose_class({"tokenizer_class": "Qwen2Tokenizer"}, {}, byte_level=True).name == "Qwen2Tokenizer"


def test_the_classes_of_mlx_lms_model_types_are_those_of_transformers() -> None:
    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING
    from transformers.models.auto.tokenization_auto import (
        MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
        TOKENIZER_MAPPING_NAMES,
    )

    types = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)} | set(MODEL_REMAPPING)
    for model_type in types:
        model, registered = {"model_type": model_type}, TOKENIZER_MAPPING_NAMES.get(model_type)
        assert choose_class(model, {}, byte_level=False).name == (registered or FILE_CLASS), model_type
        against = choose_class(model, {"tokenizer_class": "GPT2Tokenizer"}, byte_level=False).name
        stays = registered is None or (
            registered != FILE_CLASS and model_type not in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        )
        assert against == ("GPT2Tokenizer" if stays else registered), model_type


def test_every_class_of_transformers_is_known_by_what_it_does() -> None:
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    names = {name for name in dir(transformers) if name.endswith("Tokenizer")}
    names |= {name for name in TOKENIZER_MAPPING_NAMES.values() if name is not None}
    helpers = {"AutoTokenizer", "BasicTokenizer", "MecabTokenizer", "WordpieceTokenizer", "CharacterTokenizer"}
    keeps = {"ParakeetTokenizer", "PreTrainedTokenizer", "TokenizersBackend", "CodeGenTokenizer"}
    unknown = {name.removesuffix("Fast") for name in names} - helpers - keeps - OTHER_CLASSES - CLASS_TOKENS.keys()
    assert not unknown


@pytest.mark.parametrize("block", range(6))
def test_random_folders_have_the_ids_of_transformers(tmp_path: Path, block: int) -> None:
    compared = 0
    for seed in range(block * 8, block * 8 + 8):
        folder = tmp_path / str(seed)
        folder.mkdir()
        random_folder(folder, seed)
        try:
            loaded = their_tokenizer(folder)
            loaded.encode("\u0b95 漢")
        except Exception:  # noqa: BLE001 - a class whose unknown token the vocabulary lacks cannot encode there
            continue
        row = compare(str(seed), folder, random_count=20, seed=seed)
        assert row.equal == row.total, row.line()
        compared += row.total
    assert compared > 100


def test_the_older_files_count_only_where_the_config_lists_no_tokens(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": "</s>"})
    write(folder, "special_tokens_map.json", {"eos_token": {"content": "<eos>", "lstrip": True}})
    tokenizer = our_tokenizer(folder)
    assert tokenizer.eos_token == their_tokenizer(folder).eos_token == "<eos>"
    assert tokenizer.sources["special_tokens"] == "special_tokens_map.json over tokenizer_config.json"
    write(folder, "tokenizer_config.json", {"eos_token": "</s>", "added_tokens_decoder": {}})
    assert our_tokenizer(folder).eos_token == their_tokenizer(folder).eos_token == "</s>"


def test_a_class_names_the_end_token_that_no_file_names(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer"})
    tokenizer = our_tokenizer(folder)
    assert tokenizer.eos_token == "<eos>"
    assert tokenizer.eos_token_ids == {tokenizer.hf.token_to_id("<eos>")}


def test_special_tokens_may_be_split(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"split_special_tokens": True})
    tokenizer = our_tokenizer(folder)
    assert tokenizer.encode("a<eos>") == their_tokenizer(folder).encode("a<eos>")
    assert tokenizer.hf.token_to_id("<eos>") not in tokenizer.encode("a<eos>")


@pytest.fixture(scope="module")
def large_vocabulary(kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of more than 100,000 tokens: only such are mended."""
    folder = tmp_path_factory.mktemp("large")
    saved = json.loads((kinds["bytes"] / "tokenizer.json").read_text())
    first = max(token["id"] for token in saved["added_tokens"]) + 1
    saved["model"]["vocab"] |= {f"filler{index}": index for index in range(first, first + 100_001)}
    write(folder, "tokenizer.json", saved)
    write(folder, "tokenizer_config.json", {"fix_mistral_regex": True})
    return folder


@pytest.mark.parametrize(
    ("model_type", "written_by", "mended"),
    [("mistral", "4.57.0", True), ("mistral", "5.1.0", False), ("llama", "4.57.0", False)],
)
def test_mistrals_split_is_mended_where_asked_for(
    large_vocabulary: Path, model_type: str, written_by: str, mended: bool
) -> None:
    write(large_vocabulary, "config.json", {"model_type": model_type, "transformers_version": written_by})
    ours, expected = our_tokenizer(large_vocabulary), their_tokenizer(large_vocabulary)
    for text in SENTENCES:
        assert ours.encode(text) == expected.encode(text)
    assert ("mended" in ours.sources["tokenizer"]) is mended


def test_every_fact_names_its_file(folder: Path) -> None:
    write(folder, "config.json", {"model_type": "qwen2"})
    write(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "chat_template": "config"})
    (folder / "additional_chat_templates").mkdir()
    tokenizer = our_tokenizer(folder)
    assert tokenizer.sources == {
        "tokenizer": "tokenizer.json, its split replaced by the class's",
        "class": "Qwen2Tokenizer (for model type qwen2, against tokenizer_config.json's GPT2Tokenizer)",
        "special_tokens": "tokenizer_config.json",
        "template default": "tokenizer_config.json",
    }
    assert tokenizer.begins_with == [tokenizer.hf.token_to_id("<s>")]
    assert tokenizer.ends_with == []
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents")
    assert our_tokenizer(folder).sources["template rag"] == "additional_chat_templates/rag.jinja"


def test_the_classes_of_causal_models_need_no_transformers(kinds: dict[str, Path]) -> None:
    with as_model_type(kinds["sentencepiece"], "llama", tokenizer_class="LlamaTokenizer") as folder:
        code = (
            "import sys; from pathlib import Path; from engine.text.tokens.folder_tokenizer import read_folder;"
            f"read_folder(Path({str(folder)!r}));"
            "assert not {'transformers', 'mlx', 'torch'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def test_a_class_that_only_transformers_knows_is_read_through_it(kinds: dict[str, Path]) -> None:
    with as_model_type(kinds["bytes"], None, tokenizer_class="RobertaTokenizer") as folder:
        tokenizer = our_tokenizer(folder)
        assert tokenizer.sources["tokenizer"] == "tokenizer.json, through transformers"
        row = compare("roberta", folder, random_count=20)
        assert row.equal == row.total


def test_vocabulary_and_merges_alone_are_enough_for_a_class_that_builds_its_own(
    kinds: dict[str, Path], tmp_path: Path
) -> None:
    saved = json.loads((kinds["bytes"] / "tokenizer.json").read_text())["model"]
    write(tmp_path, "vocab.json", saved["vocab"])
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in saved["merges"]))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "he"})
    write(tmp_path, "config.json", {"model_type": "qwen3"})
    row = compare("qwen", tmp_path, random_count=20)
    assert row.equal == row.total
    assert our_tokenizer(tmp_path).sources["tokenizer"] == "vocab.json, through transformers"


def test_a_sentencepiece_file_alone_is_read_through_transformers(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the hello world", "and more of it", "x y z"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    write(tmp_path, "config.json", {"model_type": "llama"})
    for name in ("LlamaTokenizer", "PreTrainedTokenizerFast"):
        write(tmp_path, "tokenizer_config.json", {"tokenizer_class": name, "add_bos_token": True})
        row = compare(name, tmp_path, random_count=20)
        assert row.equal == row.total
        tokenizer = our_tokenizer(tmp_path)
        assert tokenizer.sources["tokenizer"] == "tokenizer.model, through transformers"
        assert tokenizer.begins_with == [tokenizer.hf.token_to_id("<s>")]


def test_what_is_not_read_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"tokenizer_class": "NewlineTokenizer"})
    with pytest.raises(ModelLoadError, match=r"NewlineTokenizer.*--tokenizer"):
        our_tokenizer(folder)
    mistral = tmp_path / "mistral"
    mistral.mkdir()
    write(mistral, "tekken.json", {})
    with pytest.raises(ModelLoadError, match=r"tekken\.json.*--tokenizer"):
        our_tokenizer(mistral)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template is neither a text nor texts by name"),
        ("tokenizer_config.json", {"chat_template": [None]}, "chat_template is neither"),
        ("chat_template.json", {"chat_template": [{"name": {}, "template": "x"}]}, "chat_template is neither"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, "special tokens of tokenizer_config.json"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "x"}}}, "special tokens of"),
        ("special_tokens_map.json", {"eos_token": "\ud800"}, "special tokens of"),
        ("added_tokens.json", {"x": "y", "z": []}, "special tokens of"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id '</s>' is neither a token id nor a list"),
        ("generation_config.json", {"eos_token_id": [2, None]}, "is neither a token id nor a list"),
        ("generation_config.json", {"eos_token_id": True}, "is neither a token id nor a list"),
        ("config.json", {"text_config": [], "eos_token_id": {"a": 1}}, "is neither a token id nor a list"),
    ],
)
def test_what_files_hold_in_place_of_tokens_is_refused_in_one_line(
    folder: Path, name: str, content: object, says: str
) -> None:
    write(folder, name, content)
    with pytest.raises(ModelLoadError) as caught:
        our_tokenizer(folder)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("chat_template.jinja", b"\xff"), ("special_tokens_map.json", b"[" * 100_000)]
)
def test_a_file_that_is_no_text_or_has_no_end_is_refused_by_its_name(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=name):
        our_tokenizer(folder)


@pytest.mark.parametrize("package", FOLDERS, ids=lambda package: str(package.requirement))
def test_the_tokenizers_of_packages_have_the_ids_of_transformers(package: TokenizerPackage) -> None:
    for model_type in package.model_types:
        with as_model_type(package_folder(package), model_type) as copy:
            row = compare(package.requirement, copy)
            assert (row.equal, row.beyond) == (row.total, 0), row.line()
