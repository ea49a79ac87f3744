"""Files of weights: what is read, and what is refused. record_inception.py makes the files that torch wrote."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxarch.gan.weights import read_tensors
from jaxarch.run.protocol import ConfigError

RECORDED = Path(__file__).parent / "recorded"


def expected() -> dict[str, np.ndarray]:
    """As record_inception.py has them."""
    whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    return {
        "whole": whole,
        "view": whole[1, 1:],
        "turned": whole.transpose(2, 1, 0),
        "parameter": np.float32([0.5, -0.5]),
        "half": np.float16([1, 2, 3]),
        "number": np.array(7, np.int64),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("file", ["zipped.pth", "in_sequence.pth"])
def test_files_that_torch_wrote(file):
    same(read_tensors(RECORDED / file), expected())


def test_other_formats(tmp_path):
    arrays = {name: np.ascontiguousarray(array) for name, array in expected().items()}
    save_file(arrays, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **arrays)
    same(read_tensors(tmp_path / "a.safetensors"), arrays)
    same(read_tensors(tmp_path / "a.npz"), arrays)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_live(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).to(torch.bfloat16)
    torch.save(model.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read_tensors(tmp_path / "a.pth")
    wanted = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    same({name: array.astype(np.float32) for name, array in found.items()}, wanted)
    assert found["0.weight"].dtype == ml_dtypes.bfloat16 and found["1.num_batches_tracked"].dtype == np.int64


class Program:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return os.mkdir, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
def test_a_program_in_the_file_is_not_run(zipped, tmp_path):
    file = tmp_path / "a.pth"
    content = pickle.dumps({"a": Program(str(tmp_path / "made"))}, protocol=2)
    if zipped:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", content)
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a.pth holds posix.mkdir, not tensors alone; it is not read\.$"):
        read_tensors(file)
    assert not (tmp_path / "made").exists()
    pickle.loads(content)
    assert (tmp_path / "made").exists()


def pickled(count: int, offset: int, size: int, stride: int) -> bytes:
    """{"a": a tensor of one axis}, as torch writes it: what a file says of a tensor may be false."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    view = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85" + b"\x89N"
    return b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tRs."


@pytest.mark.parametrize(
    "said, taken",
    [
        ((6, 1, 2, 3), [1, 4]),
        ((6, 0, 3, 3), None),  # its third number would be the seventh
        ((6, 6, 1, 1), None),
        ((6, -1, 2, 1), None),
        ((6, 5, 3, -2), None),
        ((7, 0, 1, 1), None),
    ],
)
def test_a_tensor_does_not_reach_beyond_its_numbers(said, taken, tmp_path):
    file = tmp_path / "a.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(*said))
        archive.writestr("archive/data/0", np.arange(6, dtype=np.float32).tobytes())
    if taken:
        assert read_tensors(file)["a"].tolist() == taken
    else:
        with pytest.raises(ConfigError, match="a.pth is damaged"):
            read_tensors(file)


def test_what_is_no_file_of_tensors(tmp_path):
    file = tmp_path / "a.pth"
    for content in (b"", b"PK", b"hello", pickle.dumps([1, 2]), b"\x80\x02}q\x00."):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="a.pth is damaged, or no file of weights"):
            read_tensors(file)
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory\.$"):
        read_tensors(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot read .*none: No such file or directory\.$"):
        read_tensors(tmp_path / "none")


@pytest.mark.parametrize("file", ["zipped.pth", "in_sequence.pth"])
def test_damage_is_one_line(file, tmp_path):
    """Cut anywhere, or with a byte changed: an answer or one line, never a trace or numbers from elsewhere."""
    whole, rng = (RECORDED / file).read_bytes(), np.random.default_rng(0)
    other, lines = tmp_path / file, []
    for number in range(400):
        content = bytearray(whole)
        if number % 2:
            content[rng.integers(len(content))] = rng.integers(256)
        else:
            content = content[: rng.integers(len(content))]
        other.write_bytes(content)
        try:
            read_tensors(other)
        except ConfigError as error:
            lines.append(str(error))
    assert len(lines) > 200 and not any("\n" in line for line in lines)
