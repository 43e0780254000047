"""Hashes of weight files: what they hold, what the hub said they hold, and what changed since."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from qhybrid.base.fingerprint import compare, fingerprint
from qhybrid.base.locate import weight_files
from qhybrid.errors import ModelError


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def hub_model(cache: Path, shards: dict[str, bytes]) -> Path:
    """A model in the layout of the Hugging Face cache: links to files named by their hash."""
    model = cache / "models--org--name"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for name, content in shards.items():
        blob = model / "blobs" / sha256(content)
        blob.write_bytes(content)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    index = {"weight_map": {f"tensor of {name}": name for name in shards}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    return snapshot


def test_sizes_and_hashes_by_name(tmp_path):
    contents = {f"model-{i}.safetensors": bytes([i]) * (1000 * i) for i in range(12)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = fingerprint([tmp_path / name for name in contents])
    assert list(found) == list(contents)
    assert found == {name: {"bytes": len(c), "sha256": sha256(c)} for name, c in contents.items()}
    assert compare(json.loads(json.dumps(found)), found) is None


def test_a_flipped_bit_in_any_file_is_found_and_named(tmp_path):
    files = [tmp_path / f"model-{i}.safetensors" for i in range(3)]
    for file in files:
        file.write_bytes(bytes(range(256)) * 4)
    before = fingerprint(files)
    for file in files:
        content = bytearray(file.read_bytes())
        content[700] ^= 8
        file.write_bytes(content)
        assert compare(before, fingerprint(files)) == f"{file.name}: its content has changed"
        content[700] ^= 8
        file.write_bytes(content)


def test_other_differences_are_named():
    facts = {name: {"bytes": 4, "sha256": name * 64} for name in "abc"}
    assert compare(facts, {n: f for n, f in facts.items() if n != "b"}) == "b: it is no longer part of the model"
    longer = {**facts, "c": {"bytes": 5, "sha256": "c" * 64}}
    assert compare(facts, longer) == "c: it has 5 bytes, and had 4"
    added = {**facts, "d": facts["a"]}
    assert compare(facts, added) == "d: it was not part of the model"
    assert compare(facts, dict(reversed(facts.items()))) is None


def test_files_of_the_hub_are_what_it_said(tmp_path):
    snapshot = hub_model(tmp_path, {"model-1.safetensors": b"first", "model-2.safetensors": b"second"})
    assert fingerprint(weight_files(snapshot))["model-2.safetensors"]["sha256"] == sha256(b"second")


def test_a_file_that_is_not_what_the_hub_said_is_named(tmp_path):
    snapshot = hub_model(tmp_path, {"model-1.safetensors": b"first", "model-2.safetensors": b"second"})
    (snapshot / "model-2.safetensors").resolve().write_bytes(b"sEcond")
    with pytest.raises(
        ModelError, match=r"^model-2\.safetensors does not have the hash that the hub gave it"
    ) as e:
        fingerprint(weight_files(snapshot))
    blob = tmp_path / "models--org--name" / "blobs" / sha256(b"second")
    assert e.value.hint == f"delete {blob}, and the model is downloaded again"


@pytest.mark.parametrize("name", [sha256(b"another")[:40], "notes", sha256(b"another").upper()])
def test_other_names_in_the_cache_are_not_taken_for_hashes(tmp_path, name):
    """Small files are named by git's hash, which is not of the content alone."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"content")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert fingerprint([tmp_path / "model.safetensors"])["model.safetensors"]["bytes"] == 7


def test_a_link_elsewhere_is_followed(tmp_path):
    target = tmp_path / ("0" * 64)
    target.write_bytes(b"content")
    (tmp_path / "model.safetensors").symlink_to(target)
    assert fingerprint([tmp_path / "model.safetensors"])["model.safetensors"]["sha256"] == sha256(b"content")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"cannot read model\.safetensors: No such file"):
        fingerprint([tmp_path / "model.safetensors"])
