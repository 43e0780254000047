"""The reader gives what safetensors wrote, and finds every kind of damaged header when it opens a file."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from qhybrid.base.safetensors_reader import DTYPES, MAX_HEADER_BYTES, SafetensorsReader
from qhybrid.errors import ModelError


def write_raw(path, header, data=b""):
    """A file with `header` (JSON value, or bytes taken as they are) and `data`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def example_tensors():
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "flags": torch.tensor([True, False])}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8):
        tensors[str(dtype)] = (torch.randn(3, 5) * 50).to(dtype)
    return tensors


def test_reads_what_was_written(tmp_path):
    tensors = example_tensors()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        assert set(reader.entries) == set(tensors)
        for name, expected in tensors.items():
            value = reader.read(name)
            assert value.dtype == expected.dtype and torch.equal(value, expected)


def test_every_dtype_of_the_table_is_read(tmp_path):
    for name, dtype in DTYPES.items():
        count = 3 * dtype.itemsize
        path = write_raw(tmp_path / f"{name}.safetensors", {"t": entry(0, count, name, [3])}, bytes(count))
        with SafetensorsReader(path) as reader:
            assert reader.read("t").dtype == dtype


def test_iterates_in_the_order_of_the_bytes(tmp_path):
    header = {"late": entry(8, 12), "first": entry(0, 4), "middle": entry(4, 8)}
    path = write_raw(tmp_path / "a.safetensors", header, bytes(range(12)))
    with SafetensorsReader(path) as reader:
        assert [item.name for item in reader] == ["first", "middle", "late"]
        assert reader.read("late").tolist() == [8, 9, 10, 11]


def test_a_buffer_is_used_when_it_is_large_enough(tmp_path):
    save_file({"a": torch.arange(4.0), "b": torch.arange(100.0)}, tmp_path / "a.safetensors")
    buffer = torch.empty(64, dtype=torch.uint8)
    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        small, large = reader.read("a", buffer=buffer), reader.read("b", buffer=buffer)
    assert small.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert large.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()
    assert torch.equal(small, torch.arange(4.0)) and torch.equal(large, torch.arange(100.0))


@pytest.mark.parametrize(
    ("header", "data", "fault"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), "overlaps"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), "overlaps"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8), "belong to no tensor"),
        ({"a": entry(0, 4)}, bytes(5), "1 bytes at its end"),
        ({"a": entry(0, 4)}, bytes(3), "truncated"),
        ({"a": entry(0, 4, "F7")}, bytes(4), "unknown dtype"),
        ({"a": entry(0, 4, ["F32"])}, bytes(4), "unknown dtype"),
        ({"a": entry(0, 4, "F32", [2])}, bytes(4), "needs 8 bytes"),
        ({"a": entry(0, 4, "U8", [-4])}, bytes(4), "impossible shape"),
        ({"a": entry(0, 4, "U8", [4.0])}, bytes(4), "impossible shape"),
        ({"a": entry(0, 1, "U8", [True])}, bytes(1), "impossible shape"),
        ({"a": entry(0, 4, "U8", "4")}, bytes(4), "impossible shape"),
        ({"a": entry(4, 0, "U8", [4])}, bytes(4), "impossible offsets"),
        ({"a": entry(0, 2**70, "U8", [2**70])}, bytes(4), "truncated"),
        ({"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, bytes(4), "impossible offsets"),
        ({"a": {"dtype": "U8", "shape": [4]}}, bytes(4), "must have dtype"),
        ({"a": 5}, b"", "must have dtype"),
        ([1, 2], b"", "not a JSON object"),
        (b"{not json", b"", "cannot be read"),
        (b"\xff\xfe", b"", "cannot be read"),
        (b"[" * 100_000, b"", "cannot be read"),
        (b'{"a":' + json.dumps(entry(0, 0)).encode() + b',"a":{}}', b"", "appears twice"),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}', b"", "appears twice"),
    ],
)
def test_faults_are_found_on_opening(tmp_path, header, data, fault):
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ModelError, match=fault) as caught:
        SafetensorsReader(path)
    assert str(path) in str(caught.value) and caught.value.hint


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="above the limit"):
        SafetensorsReader(path)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ModelError, match="cannot open"):
            SafetensorsReader(path)


def test_a_file_that_shrinks_after_opening(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    with SafetensorsReader(path) as reader:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 100)
        with pytest.raises(ModelError, match="ends inside the tensor a"):
            reader.read("a")


@settings(max_examples=60, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_found_on_opening(tmp_path_factory, fraction):
    content = save(example_tensors())
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ModelError, match=r"valid|truncated"):
        SafetensorsReader(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_flipped_header_bit_gives_a_model_error_or_sound_tensors(tmp_path_factory, data):
    tensors = {"a.weight": torch.arange(6.0), "b.weight": torch.ones(2, 3, dtype=torch.int64)}
    content = bytearray(save(tensors))
    header_end = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header_end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "a.safetensors"
    path.write_bytes(content)
    try:
        with SafetensorsReader(path) as reader:
            values = [reader.read(name) for name in reader.entries]
    except ModelError:
        return
    # What cannot be told from a sound file: another name, dtype or shape of the same size.
    assert sum(value.numel() * value.element_size() for value in values) == 6 * 4 + 6 * 8
