"""``engine.inspect``: facts with their files, what is missing or contradicts, and folders in every state."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

import engine
from engine.errors import ConfigError, ModelLoadError, ModelNotFoundError
from engine.models.local import ResolvedModel
from tests.engine.model_card.folders import (
    TEMPLATE,
    VOCAB_SIZE,
    WEIGHTS,
    card,
    changed,
    facts,
    only,
    write_folder,
    write_json,
    write_tokenizer,
    write_weights,
)
from tests.engine.models.test_resolve import COMMIT, FakeHubCache
from tests.tiny_models import family_config, tiny_config

pytestmark = pytest.mark.usefixtures("no_network")
INDEX = "model.safetensors.index.json"


def test_a_whole_folder_is_understood_and_each_fact_names_its_file(tmp_path: Path) -> None:
    found = card(write_folder(tmp_path / "m"))
    assert found.problems == ()
    architecture = facts(found, "architecture")
    assert architecture["model_type"] == ("qwen3", "config.json: model_type")
    assert architecture["runs as"][0] == "mlx_lm.models.qwen3.Model"
    assert architecture["key-value heads"] == ("1", "config.json: num_key_value_heads")
    assert facts(found, "rope")["base"] == ("10000.0", "config.json: rope_theta")
    assert facts(found, "context") == {"context": ("4096", "config.json: max_position_embeddings")}
    assert facts(found, "layers")["full"][0].startswith("2 layers (0-1)")
    assert facts(found, "weights")["element types"] == ("BF16 41.4kB", "the headers of the files")
    assert facts(found, "size")["parameters"][0] == "20704"
    assert facts(found, "end tokens") == {
        "id 2": (
            '"<|im_end|>"',
            "config.json: eos_token_id; generation_config.json: eos_token_id; tokenizer_config.json: eos_token",
        ),
        "id 3": ('"<|endoftext|>"', "generation_config.json: eos_token_id"),
    }
    assert facts(found, "sampling defaults") == {
        "temperature": ("0.6", "generation_config.json: temperature"),
        "top_k": ("20", "generation_config.json: top_k"),
    }


def test_a_tokenizer_is_described_beside_the_embedding(tmp_path: Path) -> None:
    described = facts(card(write_folder(tmp_path / "m")), "tokenizer")
    assert described["class"] == ("PreTrainedTokenizerFast", "tokenizer_config.json: tokenizer_class")
    assert described["kind"] == ("WordLevel", "tokenizer.json: model.type")
    assert described["vocabulary"] == (str(VOCAB_SIZE), "tokenizer.json: 3 of them added, 3 special")
    assert described["embedding rows"] == (str(VOCAB_SIZE), f"{WEIGHTS}: model.embed_tokens.weight")
    assert described["adds to a text"] == ("nothing", "tokenizer.json: its post-processor")
    assert described["eos_token"] == ('"<|im_end|>", id 2', "tokenizer_config.json: eos_token")


def test_a_template_tells_its_file_variables_tools_and_switch_and_the_parsers_that_it_chooses(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    source = "tokenizer_config.json: chat_template"
    found = card(folder)
    assert facts(found, "chat templates") == {
        "template": (f"{len(TEMPLATE)} characters", source),
        "variables": ("enable_thinking", source),
        "tools": ("yes", source),
        "thinking": ("enable_thinking, on unless set", source),
    }
    assert facts(found, "parsers") == {
        "reasoning": ("qwen3", "the template has <think>"),
        "tool calls": ("hermes", "the template has <tool_call>"),
    }
    named = card(folder, reasoning_parser="none", default_chat_template_kwargs={"enable_thinking": False})
    assert facts(named, "parsers")["reasoning"] == ("none", "--reasoning-parser")
    assert facts(named, "chat templates")["thinking"] == (
        "enable_thinking, off unless set",
        "--default-chat-template-kwargs",
    )


def test_a_template_file_that_differs_from_the_configurations_is_used_and_noted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ extra }}{% endfor %}")
    found = card(folder)
    assert facts(found, "chat templates")["variables"] == ("extra", "chat_template.jinja")
    assert facts(found, "chat templates")["thinking"] == ("no", "chat_template.jinja")
    assert "tokenizer_config.json: chat_template has another template" in only(found.remarks, "another template")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    same = card(folder)
    assert "chat_template.jinja; tokenizer_config.json: chat_template" in facts(same, "chat templates")["tools"][1]
    assert not any("template" in line for line in same.remarks)


def test_several_templates_are_named_one_by_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    both = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}]
    changed(folder / "tokenizer_config.json", chat_template=both)
    described = facts(card(folder), "chat templates")
    assert (described["tools"][0], described["tool_use: tools"][0]) == ("no", "yes")


def test_a_template_of_a_flag_is_shown_before_the_models_own(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    described = facts(card(folder, chat_template="{{ messages }}{{ mood }}"), "chat templates")
    assert described["variables"] == ("mood", "--chat-template, in place of the model's own")
    assert described["default: variables"] == ("enable_thinking", "tokenizer_config.json: chat_template")


def test_a_template_whose_turns_end_with_no_end_token_is_a_problem(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", eos_token_id=3, leave_out=("generation_config.json",))
    text = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    changed(folder / "tokenizer_config.json", eos_token="<|endoftext|>", chat_template=text)
    assert "ends turns with <|im_end|>, which is no end token" in only(card(folder).problems, "turns")
    changed(folder / "config.json", eos_token_id=[2, 3])
    assert card(folder).problems == ()


def test_a_template_that_is_not_valid_jinja_is_a_problem_that_names_its_file_and_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{% if x %}")
    found = card(folder)
    assert only(found.problems, "not valid Jinja").startswith("chat_template.jinja: ")
    assert found.section("tokenizer")
    assert found.section("parsers")


@pytest.mark.parametrize(
    ("name", "layers", "more"),
    [
        ("gemma4_text", {"full", "sliding", "shared", "stated window"}, "sliding"),
        ("qwen3_5_moe", {"full", "state"}, "state"),
    ],
)
def test_a_folder_with_only_a_configuration_shows_what_its_layers_keep(
    tmp_path: Path, name: str, layers: set[str], more: str
) -> None:
    write_json(tmp_path / "config.json", family_config(name))
    found = card(tmp_path)
    assert found.section("layers").keys() == layers
    assert "layers (0-" in found.section("layers")[more].text
    assert "model.safetensors missing" in only(found.problems, "missing")
    assert only(found.problems, "tokenizer").startswith("no tokenizer")
    if name == "qwen3_5_moe":
        assert facts(found, "experts")["experts"] == ("4", "config.json: text_config.num_experts")
        assert facts(found, "rope")["partial rotary"][1].startswith("config.json: text_config.rope_parameters.")
        assert facts(found, "architecture")["text model_type"][0] == "qwen3_5_moe_text"


def test_a_model_type_that_mlx_lm_lacks_is_a_problem_and_its_configuration_is_still_shown(tmp_path: Path) -> None:
    found = card(write_folder(tmp_path / "m", model_type="nonesuch"))
    assert "model_type 'nonesuch' is not supported by mlx-lm" in only(found.problems, "nonesuch")
    assert facts(found, "architecture")["hidden size"] == ("32", "config.json: hidden_size")
    assert found.section("tokenizer")
    assert found.section("weights")


def test_a_type_whose_file_in_mlx_lm_would_end_the_process_is_a_problem(tmp_path: Path) -> None:
    if importlib.util.find_spec("hf_olmo") is not None:
        pytest.skip("its package is installed")
    found = card(write_folder(tmp_path / "m", model_type="olmo"))
    assert "needs a package that is not installed" in only(found.problems, "olmo")
    with pytest.raises(ModelLoadError, match="ai2-olmo"):
        engine.plan(str(tmp_path / "m"))


def test_a_type_that_runs_as_another_says_so(tmp_path: Path) -> None:
    found = card(write_folder(tmp_path / "m", model_type="mistral"))
    assert facts(found, "architecture")["runs as"][0] == "mlx_lm.models.llama.Model (in place of mistral)"


def test_a_python_file_of_the_folder_is_named_and_never_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", model_file="own.py", auto_map={"AutoModel": "own.Model"})
    (folder / "own.py").write_text("raise SystemExit('executed')")
    for trusted in (False, True):
        found = card(folder, trust_remote_code=trusted)
        assert facts(found, "architecture")["own code"] == ("own.py: not run here", "config.json: model_file")
        assert bool(found.problems) is not trusted
    assert facts(found, "model")["Python files"] == ("own.py", "listing; none is run here")
    assert "own" not in sys.modules


def test_rope_is_read_in_each_spelling_and_two_that_differ_are_a_problem(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
    old = card(write_folder(tmp_path / "old", rope_scaling=scaling))
    assert facts(old, "rope")["scaling"] == (
        "yarn, factor 2.0, original_max_position_embeddings 1024",
        "config.json: rope_scaling.rope_type",
    )
    assert "2048" in facts(old, "context")["context"][0]
    by_layer = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    new = card(write_folder(tmp_path / "new", rope_theta=None, rope_parameters=by_layer))
    assert facts(new, "rope")["full_attention: base"] == (
        "1000000.0",
        "config.json: rope_parameters.full_attention.rope_theta",
    )
    assert facts(new, "rope")["sliding_attention: scaling"][0] == "default"
    two = card(write_folder(tmp_path / "two", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}))
    assert "500000.0, and config.json: rope_theta is 10000.0" in only(two.problems, "rope")


def test_a_base_that_no_file_names_is_the_class_own_and_said_to_be(tmp_path: Path) -> None:
    base = facts(card(write_folder(tmp_path / "m", model_type="llama", rope_theta=None)), "rope")["base"]
    assert base == ("10000", "no file: the default of mlx-lm's llama")


def test_a_context_that_the_tokenizer_cuts_or_the_scaling_does_not_reach_is_explained(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    changed(folder / "tokenizer_config.json", model_max_length=1000)
    cut = card(folder)
    assert facts(cut, "context")["context"] == (
        "1000",
        "tokenizer_config.json: model_max_length (the model's own 4096 is longer)",
    )
    scaling = {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 1024}
    far = card(write_folder(tmp_path / "far", rope_scaling=scaling))
    assert "the context is 4096, and the rope's scaling reaches 2048" in only(far.remarks, "reaches")


def test_flags_that_a_load_would_refuse_are_problems(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    long = card(folder, max_model_len=9999)
    assert "max_model_len (9999) is greater than" in only(long.problems, "max_model_len")
    unknown = card(folder, reasoning_parser="nonesuch")
    assert only(unknown.problems, "nonesuch").startswith("--reasoning-parser nonesuch")
    nowhere = card(folder, chat_template="nowhere.jinja")
    assert only(nowhere.problems, "nowhere").startswith("--chat-template nowhere.jinja: no such file")


def test_quantizations_are_read_wherever_they_stand_and_a_difference_is_a_problem(tmp_path: Path) -> None:
    own = {"bits": 4, "group_size": 64, "model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 32}, "lm_head": False}
    folder = write_folder(tmp_path / "m", quantization=own, quantization_config=own)
    same = facts(card(folder), "quantization")
    assert same == {
        "quantization": (
            "bits 4, group 64, layers of their own 1 (8 bits)",
            "config.json: quantization; config.json: quantization_config",
        )
    }
    changed(folder / "config.json", quantization_config={"bits": 8, "group_size": 64, "quant_method": "gptq"})
    write_json(folder / "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 16}})
    found = card(folder)
    assert facts(found, "quantization")["hf_quant_config.json"][0] == "format NVFP4, group 16"
    assert "quantization says bits 4, and config.json: quantization_config 8" in " ".join(found.problems)


def test_contradictions_between_weights_and_configuration_are_noted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", vocab_size=32, eos_token_id=99)
    write_weights(
        folder / WEIGHTS, {"model.embed_tokens.weight": ("F32", [48, 32]), "lm_head.weight": ("F32", [48, 32])}
    )
    found = card(folder)
    assert "vocab_size is 32, and the embedding has 48 rows" in only(found.problems, "vocab_size")
    assert "ids up to 63, and the embedding has 48 rows" in only(found.problems, "ids up to")
    assert "end token 99 (config.json: eos_token_id) is out" in only(found.problems, "end token 99")
    assert "bfloat16, and most floating values are stored as F32" in only(found.remarks, "F32")
    assert "lm_head.weight is stored too" in only(found.remarks, "lm_head")


def test_end_tokens_and_special_tokens_without_a_token_are_noted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", eos_token_id=None, leave_out=("generation_config.json",))
    changed(folder / "tokenizer_config.json", eos_token="<|nowhere|>", bos_token={"content": "<|begin|>"})
    found = card(folder)
    assert 'eos_token is "<|nowhere|>", which the vocabulary has not' in only(found.problems, "nowhere")
    assert "no file names an end token" in only(found.problems, "no file")
    assert 'bos_token is "<|begin|>"' in only(found.remarks, "begin")
    given = card(folder, override_generation_config={"eos_token_id": 3, "temperature": 0.1})
    assert facts(given, "end tokens") == {"id 3": ('"<|endoftext|>"', "--override-generation-config")}
    assert facts(given, "sampling defaults")["temperature"][1] == "--override-generation-config: temperature"


def test_vision_and_audio_are_said_to_be_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", vision_config={"depth": 1})
    write_weights(folder / WEIGHTS, {"vision_tower.x.weight": ("BF16", [500]), "model.norm.weight": ("BF16", [32])})
    found = card(folder)
    assert facts(found, "architecture")["left out"] == ("vision", "config.json: vision_config")
    assert facts(found, "weights")["not loaded"][0] == "1.0kB of vision and audio"


def test_only_a_model_that_is_not_there_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path), str(tmp_path / "nothing"), "org/nothing", "nothing"):
        with pytest.raises(ModelNotFoundError):
            engine.inspect(name)
    with pytest.raises(ConfigError):
        engine.inspect(str(tmp_path), max_model_len="many")
    write_tokenizer(tmp_path / "tokenizer.json")
    found = card(tmp_path)
    assert found.section("tokenizer")
    assert "config.json missing" in only(found.problems, "missing")
    (tmp_path / "x.gguf").write_bytes(b"GGUF and no more")
    assert engine.inspect(str(tmp_path / "x.gguf")).problems
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in (1, 2):
        (parts / f"m-Q8_0-0000{number}-of-00002.gguf").write_bytes(b"GGUF")
    assert "cut short or damaged" in only(card(parts).problems, "m-Q8_0-00001-of-00002.gguf")


def test_a_snapshot_of_the_hub_tells_its_commit_and_that_weights_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    whole = write_folder(tmp_path / "m")
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    FakeHubCache(tmp_path / "hub").add("org/name", {name: (whole / name).read_text() for name in names})
    found = engine.inspect("org/name")
    assert found.problems == ()
    assert facts(found, "model")["commit"] == (COMMIT, "refs: main")
    assert facts(found, "model")["repository"][0] == "org/name"
    assert "the weights are not here" in only(found.remarks, "weights")


def test_the_text_and_its_json_hold_no_home_folder_no_user_and_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "somebody"
    monkeypatch.setattr("engine.model_card.privacy._home_folders", lambda: (str(home),))
    monkeypatch.setattr("engine.model_card.privacy.user_name", lambda: "somebody")
    folder = write_folder(home / "models" / "m", architectures=["/Us" + "ers/other/x"])
    changed(
        folder / "tokenizer_config.json", tokenizer_class="hf_abcdefghijklmnopqrstuvwx", bos_token="/ho" + "me/third/x"
    )
    (folder / WEIGHTS).unlink()
    found = card(folder)
    for text in (str(found), json.dumps(found.to_dict())):
        assert "~/models/m" in text
        assert not any(word in text for word in ("somebody", "other", "third", "abcdefgh"))


def test_texts_of_files_cannot_steer_a_terminal_or_fill_it(tmp_path: Path) -> None:
    found = card(write_folder(tmp_path / "m", model_type="\x1b[31mred\n\u202eevil" + "x" * 5000))
    assert all(char == "\n" or char.isprintable() for char in str(found))
    assert max(map(len, str(found).splitlines())) < 800


def test_the_text_is_one_block_below_its_title_so_that_markdown_keeps_it(tmp_path: Path) -> None:
    title, *lines = str(card(write_folder(tmp_path / "m"))).splitlines()
    assert title.startswith("Model card of ")
    assert all(line.startswith("    ") for line in lines if line)


def test_a_real_file_is_described_by_its_own_keys(smollm2: ResolvedModel) -> None:
    found = engine.inspect("smollm2")
    assert (found.problems, found.remarks) == ((), ())
    assert found.file == smollm2.path.name
    assert facts(found, "rope")["base"] == ("100000.0", f"{found.file}: llama.rope.freq_base")
    assert facts(found, "weights")["element types"][0].startswith("Q4_1 66.4MB, Q8_0 30.1MB")
    assert facts(found, "size")["parameters"][0] == "134.5 million (134515008)"
    assert facts(found, "tokenizer")["unk_token"][1].endswith("tokenizer.ggml.unknown_token_id")
    assert facts(found, "end tokens")["id 2"] == ('"<|im_end|>"', f"{found.file}: tokenizer.ggml.eos_token_id")
    assert f"from {found.file}" in str(found).splitlines()[0]
    assert str(found).count(found.file) < 5


def test_a_gguf_file_of_an_architecture_that_is_not_supported_still_shows_its_shape(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "nonesuch")
    writer.add_block_count(3)
    writer.add_context_length(512)
    writer.add_tokenizer_model("none")
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = engine.inspect(str(path))
    assert "'nonesuch' is not supported" in only(found.problems, "nonesuch")
    assert "tokenizer is of kind 'none'" in only(found.problems, "tokenizer")
    assert facts(found, "architecture")["layers"] == ("3", "x.gguf: nonesuch.block_count")
    assert facts(found, "weights")["element types"] == ("F32 128B", "x.gguf: its header")


def test_a_copy_of_a_folder_elsewhere_has_the_same_card(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "one" / "m")
    shutil.copytree(first, tmp_path / "two" / "m")
    one, two = card(first), card(tmp_path / "two" / "m")
    assert (one.sections, one.remarks) == (two.sections, two.remarks)


def test_the_memory_is_what_the_plan_bills(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", tiny_config("llama", vocab_size=64))
    plan = engine.plan(str(tmp_path), max_model_len=64, device_memory=None)
    assert facts(card(tmp_path), "size")["in memory"][0] == f"{plan.model_memory / 1e3:.1f}kB"
