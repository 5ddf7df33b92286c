"""A name becomes a directory, or one line that says why not."""

import pathlib
import types

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from jaxinfer import hub


def refused(match: str):
    return pytest.raises(hub.LocateError, match=rf"\A[^\n]*{match}[^\n]*\Z")


def test_every_refusal_is_a_value_error():
    assert issubclass(hub.LocateError, ValueError)


def test_a_directory_is_itself(tmp_path):
    assert hub.locate(tmp_path) == tmp_path
    assert hub.locate(str(tmp_path)) == tmp_path


def test_home_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.locate("~/model") == tmp_path / "model"


def test_builtin_lies_inside_the_package(tmp_path, monkeypatch):
    assert pathlib.Path(hub.__file__).parent / "builtin" == hub.BUILTIN
    monkeypatch.setattr(hub, "BUILTIN", tmp_path)
    assert hub.locate("builtin") == tmp_path
    monkeypatch.setattr(hub, "BUILTIN", tmp_path / "missing")
    with refused("lacks the built-in model"):
        hub.locate("builtin")


def test_a_directory_called_builtin_is_reached_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "builtin").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.locate("./builtin").resolve() == tmp_path / "builtin"


@pytest.mark.parametrize("name", ["", "  ", "gpt2", "/no/such/directory", "./missing", "a/b/c", "owner/", "~/no/x"])
def test_a_name_that_fits_nothing_is_told_what_fits(name):
    with refused("a model is 'builtin', a directory, or a hub id owner/name"):
        hub.locate(name)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model"])
def test_a_name_that_the_system_refuses_is_one_line_too(name):
    with pytest.raises(hub.LocateError):
        hub.locate(name)


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with refused("is a file.*pass the directory"):
        hub.locate(path)


# --- hub ids -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list:
    """What snapshot_download was asked for; it answers with a directory."""
    calls = []

    def answer(repo, **kwargs):
        calls.append((repo, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    return calls


def test_a_hub_id_is_downloaded_with_its_revision(asked, tmp_path):
    assert hub.locate("owner/name") == tmp_path
    assert hub.locate("owner/na.me-1@refs/pr/3") == tmp_path
    assert [repo for repo, _ in asked] == ["owner/name", "owner/na.me-1"]
    assert [kwargs["revision"] for _, kwargs in asked] == [None, "refs/pr/3"]


def test_a_directory_comes_before_a_hub_id(asked, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.locate("owner/name") == pathlib.Path("owner/name")
    assert asked == []


def downloaded(kwargs: dict, paths: list[str]) -> list[str]:
    from huggingface_hub.utils import filter_repo_objects

    names = ("allow_patterns", "ignore_patterns")
    return list(filter_repo_objects(paths, **{name: kwargs[name] for name in names}))


def test_only_the_checkpoint_is_downloaded(asked):
    wanted = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    ]
    unwanted = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "original/params.json",
        "original/tokenizer.model",
        "onnx/config.json",
        "adapter/model.safetensors",
        "README.md",
        "model.gguf",
    ]
    hub.locate("owner/name")
    assert downloaded(asked[0][1], wanted + unwanted) == wanted


def test_files_narrow_the_download(asked):
    hub.locate("owner/name", ["tokenizer*"])
    assert downloaded(asked[0][1], ["tokenizer.json", "model.safetensors"]) == ["tokenizer.json"]


def answer(status: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(status_code=status, headers={}, request=None)


FAILURES = {
    "missing": (lambda: errors.RepositoryNotFoundError("404\nlong", response=answer(404)), "shows no model owner/name"),
    "gated": (lambda: errors.GatedRepoError("403\nlong", response=answer(403)), "is gated: accept.*HF_TOKEN"),
    "revision": (lambda: errors.RevisionNotFoundError("404", response=answer(404)), "revision v9 is not: name"),
    "server": (lambda: errors.HfHubHTTPError("500\nServer", response=answer(500)), "not be downloaded.*500 Server"),
    "network": (lambda: errors.HTTPError("no route\nto host"), "could not be downloaded.*no route to host"),
    "absent": (lambda: errors.LocalEntryNotFoundError("not\nthere"), "hub cannot be reached: check the network"),
    "id": (lambda: errors.HFValidationError("bad\nid"), "the hub does not take it"),
    "disk": (lambda: OSError(28, "No space left on device"), "could not be downloaded.*No space left"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_every_failure_of_the_hub_becomes_one_line(monkeypatch, case):
    failure, match = FAILURES[case]

    def fail(*args, **kwargs):
        raise failure()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with refused(match):
        hub.locate("owner/name@v9")


@pytest.fixture
def offline(monkeypatch, tmp_path) -> pathlib.Path:
    """HF_HUB_OFFLINE=1 with a cache of our own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_offline_a_cached_model_is_found(offline):
    commit = "0" * 40
    cached = offline / "models--owner--name" / "snapshots" / commit
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    refs = cached.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    assert hub.locate("owner/name") == cached


def test_offline_a_model_that_is_not_cached_is_told_so(offline):
    with refused("not .completely. in the cache while HF_HUB_OFFLINE is set: download it once"):
        hub.locate("owner/name")


def test_an_id_that_the_hub_would_not_take_is_refused(offline):
    with refused("the hub does not take it as an id"):
        hub.locate("owner/na--me")
