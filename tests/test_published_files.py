"""Files of torch.save are read without running anything that they name, and only where they are whole."""

import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import released
import torch
from safetensors.torch import save_file

from cogview.published.inert import Inert, Mapping, Stored
from cogview.published.torch_file import TorchFile
from cogview.published.transformer import Published

ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
WEIGHTS = {"a": torch.arange(6.0).half().view(2, 3), "b": torch.randn(3, 4).t(), "c": torch.nn.Parameter(torch.ones(2))}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


class Sets:
    """What unpickling gives its state, and writes a file then."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        Path(path).touch()


class Calls:
    """What unpickling calls something for."""

    def __init__(self, function: Any, *arguments: Any):
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def system(p: Path) -> bytes:
    return text(f"touch {p}") + b"\x85R."


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "reduce": lambda p: pickle.dumps(Calls(os.system, f"touch {p}"), protocol=2),
    "exec": lambda p: pickle.dumps(Calls(exec, f"open({str(p)!r}, 'w')"), protocol=0),
    "python 2": lambda p: f"c__builtin__\nopen\n(V{p}\nVw\ntR.".encode(),
    "setstate": lambda p: pickle.dumps(Sets(p), protocol=2),
    "inst": lambda p: f"(V{p}\nVw\nibuiltins\nopen\n.".encode(),
    "obj": lambda p: f"(cbuiltins\nopen\nV{p}\nVw\no.".encode(),
    "dotted": lambda p: b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + system(p),
    "of torch": lambda p: b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93" + system(p),
    "import": lambda p: b"\x80\x02cwritten_when_imported\nThing\n)\x81.",
    "getattr": lambda p: b"cbuiltins\ngetattr\n(cimportlib\nimport_module\n(Vos\ntRVsystem\ntR" + system(p),
}


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """A file that nothing may make."""
    path = tmp_path / "made"
    (tmp_path / "written_when_imported.py").write_text(f"open({str(path)!r}, 'w').close()\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "written_when_imported", raising=False)
    return path


def with_pickle(path: Path, content: bytes, weights: Any = WEIGHTS) -> Path:
    """A zip file of torch.save whose data.pkl is another one."""
    torch.save({"module": weights}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in members.items():
            archive.writestr(name, content if name.endswith("/data.pkl") else value)
    return path


def pickled(path: Path, weights: Any = WEIGHTS) -> bytes:
    """The data.pkl of {"module": weights} up to its end, where the outer dict is on the stack."""
    torch.save({"module": weights}, path)
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)[:-1]


@pytest.mark.parametrize("how", HOSTILE)
def test_nothing_that_a_file_names_is_called(tmp_path, mark, how):
    hostile = HOSTILE[how](mark)
    pickle.loads(hostile)
    assert mark.exists()  # it would have been
    mark.unlink()
    sys.modules.pop("written_when_imported", None)

    state = pickled(path := tmp_path / "a.pt") + text("trainer") + hostile[:-1] + b"s."
    file = TorchFile(with_pickle(path, state))
    assert torch.equal(file.tensor(file.content["module"]["a"], "a"), WEIGHTS["a"])
    assert isinstance(file.content["trainer"], Inert)
    inside = b"\x80\x02}" + text("module") + b"}" + text("a") + hostile[:-1] + b"ss."
    (tmp_path / "1").mkdir()
    with_pickle(tmp_path / "1" / "mp_rank_00_model_states.pt", inside)
    with pytest.raises(ValueError, match="module: expected tensors by name, got 'a'"):
        Published.read(tmp_path / "1")
    storage = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + hostile[:-1] + b"K\x00K\x02\x85K\x01\x85\x89NtR."
    file = TorchFile(with_pickle(path, storage))
    with pytest.raises(ValueError, match="x is not described as a tensor"):
        file.tensor(file.content, "x")
    reference = b"\x80\x02(" + text("storage") + hostile[:-1] + text("0") + text("cpu") + b"K\x06tQ."
    assert isinstance(TorchFile(with_pickle(path, reference)).content, Inert)
    assert not mark.exists()
    assert "written_when_imported" not in sys.modules


def test_nothing_is_called_in_the_legacy_format(tmp_path, mark):
    content = {"module": WEIGHTS, "b": Sets(mark), "a": Calls(os.system, f"touch {mark}")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    file = TorchFile(tmp_path / "a.pt")
    assert torch.equal(file.tensor(file.content["module"]["a"], "a"), WEIGHTS["a"])
    assert isinstance(file.content["a"], Inert)
    assert isinstance(file.content["b"], Inert)
    for first in ("reduce", "exec"):  # instead of the magic number
        (tmp_path / "b.pt").write_bytes(HOSTILE[first](mark) + (tmp_path / "a.pt").read_bytes())
        with pytest.raises(ValueError, match="it does not begin as one"):
            TorchFile(tmp_path / "b.pt")
    assert not mark.exists()


KNOWN = {
    "tensor": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "parameter": b"ctorch._utils\n_rebuild_parameter\n",
    "dict": b"ccollections\nOrderedDict\n",
    "a dict": b"ccollections\nOrderedDict\n)R",
    "storage": b"ctorch\nHalfStorage\n",
    "other": b"cno\nThing\n",
    "another": b"cno\nThing\n)R",
}


@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
def test_what_is_known_cannot_be_changed(tmp_path, known):
    kinds = (Stored, Mapping, Inert)
    before = [dict(vars(kind)) for kind in kinds]
    change = known + b"N}" + text("items") + text("x") + text("shape") + text("x") + b"u\x86b."
    change = change.replace(b"N}", b"N}(")
    content = TorchFile(with_pickle(tmp_path / "a.pt", b"\x80\x02" + change)).content
    assert [dict(vars(kind)) for kind in kinds] == before
    assert "items" not in getattr(content, "__dict__", {})


@ZIPPED
def test_tensors_of_both_formats(tmp_path, zipped):
    shared = torch.arange(10.0)
    saved = {**WEIGHTS, "d": shared[2:5], "e": shared[4:].view(2, 3), "f": torch.zeros(0, 3), "g": torch.tensor(7)}
    saved["h"] = torch.randn(3).bfloat16()
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    file = TorchFile(tmp_path / "a.pt")
    assert file.content.keys() == saved.keys()
    for name, value in saved.items():
        found = file.tensor(file.content[name], name)
        assert (found.dtype, list(found.shape)) == (value.dtype, file.content[name].shape)
        assert torch.equal(found, value)


@ZIPPED
def test_files_that_are_not_whole(tmp_path, zipped):
    torch.save({"module": WEIGHTS}, path := tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for end in [*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"a\.pt is no whole file of torch\.save: \S"):
            TorchFile(path)


def test_files_of_another_kind(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "safetensors")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"module": 1}))
    with tarfile.open(tmp_path / "tar", "w") as archive:
        archive.add(tmp_path / "text", "storages")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a/b", "c")
    for name in ("safetensors", "text", "pickle", "tar", "zip"):
        with pytest.raises(ValueError, match=f"{name} is no whole file of torch"):
            TorchFile(tmp_path / name)
    with pytest.raises(ValueError, match="there is no file"):
        TorchFile(tmp_path / "nothing")


def described(size: bytes, stride: bytes, offset: bytes = b"K\x00", count: bytes = b"K\x06") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nHalfStorage\n" + text("0") + text("cpu") + count + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89NtR."


def only_tensor(path: Path) -> torch.Tensor:
    file = TorchFile(path)
    return file.tensor(file.content if isinstance(file.content, Stored) else Stored(), "x")


LIES = {
    "too long": (described(b"K\x07\x85", b"K\x01\x85"), "x is larger than what is stored of it"),
    "behind the end": (described(b"K\x06\x85", b"K\x01\x85", b"K\x01"), "x is larger than what is stored of it"),
    "strides": (described(b"K\x02K\x03\x86", b"K\x04K\x01\x86"), "x is larger than what is stored of it"),
    "one for many": (described(b"K\x09\x85", b"K\x00\x85"), "x is larger than what is stored of it"),
    "stride below 0": (described(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "x has no proper shape"),
    "offset below 0": (described(b"K\x02\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"), "x has no proper shape"),
    "other lengths": (described(b"K\x02\x85", b"K\x01K\x01\x86"), "x has no proper shape"),
    "a list": (described(b"K\x02\x85", b"]"), "x has no proper shape"),
    "bool": (described(b"\x88\x85", b"K\x01\x85"), "x has no proper shape"),
    "count": (described(b"K\x06\x85", b"K\x01\x85", count=b"K\x07"), "fewer than its tensors"),
    "count below 0": (described(b"K\x06\x85", b"K\x01\x85", count=b"J\xff\xff\xff\xff"), "unknown reference 'storage'"),
    "missing": (described(b"K\x06\x85", b"K\x01\x85").replace(text("0"), text("9")), "data/9 is missing"),
    "a path": (described(b"K\x06\x85", b"K\x01\x85").replace(text("0"), text("../../data.pkl")), "is missing"),
    "huge memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "x is not described"),  # 32 GB of memo, for pickle's C code
    "huge bytes": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00abc.", "no whole file"),
    "extension": (b"\x80\x02\x82\x01.", "no whole file"),
    "no reference": (b"\x80\x02" + text("a") + text("b") + b"Q.", "no whole file"),
}


@pytest.mark.parametrize(("content", "said"), LIES.values(), ids=LIES)
def test_tensors_that_are_not_there(tmp_path, content, said):
    """Sizes, places and references that a file lies about."""
    path = with_pickle(tmp_path / "a.pt", content, {"a": torch.arange(6.0).half()})
    with pytest.raises(ValueError, match=said):
        only_tensor(path)


def test_an_archive_that_lies(tmp_path):
    """A member that would go on behind the end of the file."""
    torch.save({"a": torch.zeros(100).half()}, path := tmp_path / "a.pt")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    entry = whole.rindex(b"PK\1\2", 0, whole.rindex(b"/data/0"))  # of the list at the end
    for at, value in ((24, 1 << 30), (20, 1 << 30)):
        assert struct.unpack_from("<I", whole, entry + at) == (member.file_size,)
        whole = whole[: entry + at] + struct.pack("<I", value) + whole[entry + at + 4 :]
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="ends behind the end of the file"):
        TorchFile(path)


def test_a_whole_file_by_the_same_words(tmp_path):
    """What those lies are made of is read where it is true."""
    path = with_pickle(tmp_path / "a.pt", described(b"K\x06\x85", b"K\x01\x85"), {"a": torch.arange(6.0).half()})
    assert only_tensor(path).tolist() == [0, 1, 2, 3, 4, 5]


@ZIPPED
def test_released_state_is_refused_by_torch_and_read_here(tmp_path, zipped):
    """Trainer and random state of classes that are nowhere; torch itself reads no such file without running it."""
    module = released.module(384)
    released.write_model(tmp_path, module, zipped=zipped)
    path = tmp_path / "20" / "mp_rank_00_model_states.pt"
    with pytest.raises((pickle.UnpicklingError, AttributeError, ModuleNotFoundError)):
        torch.load(path, weights_only=True)
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    found = Published.read(tmp_path)
    assert found.iteration == 20
    assert "np_rng_state" in found.others
    for name, value in module.items():
        assert torch.equal(found.files[0].tensor(found.modules[0][name], name), value), name


@pytest.mark.parametrize(
    "code", [b"\x96" + (1 << 40).to_bytes(8, "little"), b"\x8f", b"\x91"], ids=["array", "set", "frozen"]
)
def test_nothing_large_is_made_of_few_bytes(code, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x05" + code + b".")
    with pytest.raises(ValueError, match=r"model\.pt is no whole file of torch\.save"):
        TorchFile(tmp_path / "model.pt")
