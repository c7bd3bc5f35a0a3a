"""The reader and the writer, against torch and malicious files."""

import collections
import io
import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlm_jax.features.pth import PthError, read_pth, write_pth
from xlvlm_jax.features.pth.writer import Numbers, View

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "complex64", "complex128", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2"),
)
FORMATS = (
    {},
    {"_use_new_zipfile_serialization": False},
    {"pickle_protocol": 3},
    {"pickle_protocol": 4},
)


def raw(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().contiguous().reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def zipped(pickled: bytes, storages: dict[str, bytes] | None = None, **records: bytes) -> bytes:
    """Returns a file in the layout of torch.save."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


@pytest.fixture
def file(tmp_path):
    """file(bytes) writes a file and returns its path."""

    def write(content: bytes) -> pathlib.Path:
        (tmp_path / "x.pth").write_bytes(content)
        return tmp_path / "x.pth"

    return write


def touch_all(value, seen=None):
    """Reads every tensor in a value."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if hasattr(value, "numpy"):
        np.asarray(value).tobytes()
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            touch_all(inner, seen)


@pytest.mark.parametrize("options", FORMATS)
def test_what_torch_writes_is_read_to_the_bit(tmp_path, options):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {dtype: torch.tensor([1, 0, 3]).to(getattr(torch, dtype)) for dtype in DTYPES}
    tensors |= {
        "transposed": base.T,
        "part": base[1:, 2::2],  # of the storage that the others share
        "expanded": torch.tensor([7.0]).expand(3, 2),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base),
    }
    torch.save(tensors, tmp_path / "x.pth", **options)
    found = read_pth(tmp_path / "x.pth")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        array = np.asarray(found[name])
        assert array.shape == tuple(tensor.shape), name
        assert np.ascontiguousarray(array).tobytes() == raw(tensor), name
    assert found["bfloat16"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("options", FORMATS)
def test_plain_values_and_those_of_numpy(tmp_path, options):
    value = {
        "ordered": collections.OrderedDict(a=1),
        "array": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "number": np.float32(2.5),
        "path": pathlib.PurePosixPath("/a/b.jpg"),
        "size": torch.Size([2, 3]),
        "plain": [(1, -2.5, None, True), "é", b"\x00\xff", 2**70, {"k": []}],
    }
    torch.save(value, tmp_path / "x.pth", **options)
    found = read_pth(tmp_path / "x.pth")
    np.testing.assert_array_equal(found["array"], value["array"])
    np.testing.assert_array_equal(found["fortran"], value["fortran"])
    same = ("ordered", "number", "size", "plain")
    assert {key: found[key] for key in same} == {key: value[key] for key in same}
    assert found["path"] == "/a/b.jpg"


def test_torch_reads_what_we_write(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 4))
    arrays = {dtype: values.astype(dtype) for dtype in ("float64", "float32", "int64", "bool")}
    arrays |= {"bf": values.astype(ml_dtypes.bfloat16), "view": values.T[1:], "0": np.array(2)}
    arrays |= {"none": np.zeros((0, 3), np.float16), "big": np.arange(3, dtype=">i4")}
    plain = ["é", 1, -(2**40), 2.5, None, True, (False, {}), []]
    write_pth(tmp_path / "x.pth", {"arrays": arrays, "plain": plain})
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "x.pth", weights_only=True, **options)
        assert loaded["plain"] == plain
        for name, array in arrays.items():
            tensor = loaded["arrays"][name]
            assert tuple(tensor.shape) == array.shape
            little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))
            assert raw(tensor) == little.tobytes(), name
    again = read_pth(tmp_path / "x.pth")
    assert again["plain"] == plain
    np.testing.assert_array_equal(again["arrays"]["view"], values.T[1:])
    assert not list(tmp_path.glob("*.tmp"))


def test_views_share_a_storage_that_comes_in_blocks(tmp_path):
    whole = np.arange(24, dtype=np.float32)
    numbers = Numbers(whole.dtype, whole.size, lambda: iter((whole[:10], whole[10:])))
    count = 2500  # of small dictionaries, in an iterator: more than a reader appends at once
    value = {
        "views": [View(numbers, 4, (1, 2, 3)), View(numbers, 0, (24,)), View(numbers, 24, (0, 3))],
        "many": ({"a name": View(numbers, i % 24, ())} for i in range(count)),
        "none": iter(()),
    }
    write_pth(tmp_path / "x.pth", value)
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        assert names == ["archive/data/0"]
        assert archive.read(names[0]) == whole.tobytes()
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "x.pth", weights_only=True, **options)
        assert loaded["views"][0].tolist() == [[[4, 5, 6], [7, 8, 9]]]
        assert loaded["views"][1].tolist() == whole.tolist()
        assert loaded["views"][2].shape == (0, 3)
        assert [each["a name"].item() for each in loaded["many"]] == [i % 24 for i in range(count)]
        assert loaded["none"] == []
    again = read_pth(tmp_path / "x.pth")
    np.testing.assert_array_equal(again["views"][0], whole[4:10].reshape(1, 2, 3))
    assert len(again["many"]) == count


def test_the_same_value_gives_the_same_bytes(tmp_path):
    value = {"a": np.arange(3), "b": [1]}
    for name in ("x", "y"):
        write_pth(tmp_path / name, value)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_file_of_a_big_endian_machine(file):
    pickled = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
        b"X\x01\0\0\x000X\x03\0\0\0cpuK\x02tQK\0K\x02\x85K\x01\x85\x89}tR."
    )
    content = zipped(pickled, {"0": struct.pack(">2f", 1.5, -2)}, byteorder=b"big")
    assert np.asarray(read_pth(file(content))).tolist() == [1.5, -2]


class OldDict:
    """Pickles like an OrderedDict under Python 2: with pairs as lists, and attributes."""

    def __init__(self, pairs, **attributes):
        self.pairs, self.attributes = pairs, attributes

    def __reduce__(self):
        state = (self.attributes,) if self.attributes else ()
        return collections.OrderedDict, ([list(pair) for pair in self.pairs],), *state


def old_file(value) -> bytes:
    """Returns a file of the first torch versions: five pickles of protocol 2, then the storages."""
    tensors: list[torch.Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if not isinstance(item, Stored):
                return None
            tensors.append(item.tensor)
            key = str(len(tensors) - 1)
            return "storage", torch.FloatStorage, key, "cpu", item.tensor.numel(), None

        def reducer_override(self, item):
            if item is torch.FloatStorage:
                return "FloatStorage"
            if isinstance(item, torch.Tensor):
                shape, strides = tuple(item.shape), item.stride()
                stored = Stored(item.contiguous())
                rebuild = torch._utils._rebuild_tensor_v2
                return rebuild, (stored, 0, shape, strides, False, OldDict([]))
            return NotImplemented

    stream = io.BytesIO()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    for head in (0x1950A86A20F9469CFC6C, 1001, system):
        pickle.dump(head, stream, 2)
    Pickler(stream, 2).dump(value)
    pickle.dump([str(i) for i in range(len(tensors))], stream, 2)
    for tensor in tensors:
        stream.write(struct.pack("<q", tensor.numel()) + raw(tensor))
    return stream.getvalue()


class Stored:
    """The storage of a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_dictionaries_of_old_torch_are_made_of_pairs(file):
    states = torch.arange(6.0).reshape(1, 2, 3)
    weights = OldDict([("norm.weight", states[0]), ("norm.bias", states[0, 0])], _metadata={"v": 1})
    value = {"hidden_states": [{"norm": states}, {"norm": states + 1}], "weights": weights}
    path = file(old_file(value))
    # torch itself, whose OrderedDict takes the pairs, agrees.
    expected = torch.load(path, weights_only=False)
    found = read_pth(path)
    assert list(found["weights"]) == list(expected["weights"]) == ["norm.weight", "norm.bias"]
    for name, tensor in expected["weights"].items():
        np.testing.assert_array_equal(np.asarray(found["weights"][name]), tensor.numpy())
    for mine, theirs in zip(found["hidden_states"], expected["hidden_states"], strict=True):
        np.testing.assert_array_equal(np.asarray(mine["norm"]), theirs["norm"].numpy())


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (b"K\x01\x85", "built from a int, expected pairs"),
        (b"]K\x01a\x85", "not built from pairs"),
        (b"](]K\x01ae\x85", "not built from pairs"),
        (b"](](]K\x01ee\x85", "a dictionary has a list as a key"),
    ],
)
def test_invalid_pairs_of_a_dictionary_are_refused(file, pairs, message):
    with pytest.raises(PthError, match=message):
        read_pth(file(zipped(b"ccollections\nOrderedDict\n" + pairs + b"R.")))


def test_pairs_that_are_used_repeatedly_are_counted(file):
    """The file builds 1,000 dictionaries from one list of 20,000 pairs."""
    pairs = b"](" + b"".join(b"](K\x01K\x02e" for _ in range(20_000)) + b"e\x85q\x00"
    one = b"ccollections\nOrderedDict\nh\x00R"
    with pytest.raises(PthError, match="take more than 64 MiB"):
        read_pth(file(zipped(pairs + b"0](" + one * 1000 + b"e.")))


class Harm:
    """Pickles as a call of the given function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [zipped, lambda pickled: pickled], ids=["zip", "bare"])
def test_a_crafted_pickle_is_refused_by_name(file, protocol, wrap, tmp_path):
    witness = tmp_path / "witness"
    for harm, name in (
        (Harm(os.system, f"touch {witness}"), rf"{os.name}\.system"),
        (Harm(eval, "1"), r"\w+\.eval"),
        (Harm(getattr, "", "join"), r"\w+\.getattr"),
        (Harm(torch.load, "x"), r"torch\.serialization\.load"),
    ):
        content = pickle.dumps({"hidden_states": [harm]}, protocol)
        with pytest.raises(PthError, match=rf"x\.pth: asks for {name}, which is neither a tensor"):
            read_pth(file(wrap(content)))
    assert not witness.exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"(S'true'\nios\nsystem\n.", "asks for os.system"),
        (b"(itorch\nSize\n.", "opcode INST"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"ctorch\nSize\n)\x81.", "opcode NEWOBJ"),
        (b"X\x01\0\0\0a)R.", "calls a str"),
        (b"](e}b.", "sets the state of a list"),
        (b"}()K\x01u.", "has a tuple as a key"),
        (b"cnumpy\ndtype\nX\x02\0\0\0O8\x85R.", "dtype 'O8'; expected plain numbers"),
        (b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.", "calls a str"),
        (b"X\x01\0\0\0aQ.", "not enough values"),
        (b"K\x01", "no end|exhausted"),
        (b"h\x05.", "KeyError"),
        (b"r\xff\xff\xff\xff.", "IndexError"),
    ],
)
def test_other_opcodes_are_refused(file, pickled, message):
    with pytest.raises(PthError, match=message):
        read_pth(file(zipped(pickled)))


def tensor_pickle(shape: str, strides: str, length: int = 4, times: int = 1) -> bytes:
    """Returns a pickled list of tensors on one float storage; shape and strides as opcodes."""
    one = (
        "ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\n"
        f"S'0'\nS'cpu'\nI{length}\ntQI0\n({shape}t({strides}tI00\n}}tR"
    )
    return f"]({one * times}e.".encode()


def test_a_short_file_cannot_request_much_memory(file):
    storage = {"0": bytes(16)}
    huge = zipped(tensor_pickle("I1000000000\nI1000\n", "I0\nI0\n"), storage)
    with pytest.raises(PthError, match="take more than 64 MiB, many times the file's size"):
        read_pth(file(huge))
    many = zipped(tensor_pickle("I10000000\n", "I0\n", times=3), storage)
    with pytest.raises(PthError, match="take more than 64 MiB"):
        read_pth(file(many))
    beyond = zipped(tensor_pickle("I5\n", "I1\n"), storage)
    with pytest.raises(PthError, match="reaches value 4 of a storage of 4"):
        read_pth(file(beyond))
    for shape, strides in (("I-1\n", "I1\n"), ("I2\n", "I-1\n"), ("I2\n", ""), ("I01\n", "I1\n")):
        with pytest.raises(PthError, match=r"invalid shape|strides"):
            read_pth(file(zipped(tensor_pickle(shape, strides), storage)))
    with pytest.raises(PthError, match="storage '0' has 16 bytes, expected 4000000"):
        read_pth(file(zipped(tensor_pickle("I1\n", "I1\n", length=10**6), storage)))


def test_damaged_files(file, tmp_path):
    torch.save({"x": torch.arange(100.0)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    with pytest.raises(PthError, match=r"not written by torch\.save"):
        read_pth(file(whole[: len(whole) // 2]))
    at = whole.index(torch.arange(100.0).numpy().tobytes())
    flipped = whole[:at] + b"\x01" + whole[at + 1 :]
    with pytest.raises(PthError, match=r"data/0' is damaged \(its checksum differs\)"):
        read_pth(file(flipped))
    with pytest.raises(PthError, match="empty; expected"):
        read_pth(file(b""))
    with pytest.raises(PthError, match=r"is compressed, which torch\.save never does"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", bytes(1000))
        read_pth(file(stream.getvalue()))
    with pytest.raises(PthError, match=r"a zip file with 0 data\.pkl"):
        read_pth(file(zipped(b"N.").replace(b"data.pkl", b"data.txt")))
    with pytest.raises(FileNotFoundError, match=r"no such file; expected a \.pth file"):
        read_pth(tmp_path / "nowhere.pth")
    torch.save(torch.arange(3.0), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes()
    with pytest.raises(PthError, match="truncated"):
        read_pth(file(old[:-1]))


SAMPLE = {
    "hidden_states": [{"norm": torch.arange(6.0, dtype=torch.float16).reshape(1, 2, 3)}] * 2,
    "token_of_interest_mask": [torch.tensor([True]), torch.tensor([False])],
    "image": [["a.jpg"], ["b.jpg"]],
    "array": np.arange(3),
}


def _saved(**options) -> bytes:
    stream = io.BytesIO()
    torch.save(SAMPLE, stream, **options)
    return stream.getvalue()


LEGACY = _saved(_use_new_zipfile_serialization=False)
ZIP = _saved()
with zipfile.ZipFile(io.BytesIO(ZIP)) as _archive:
    PICKLE = _archive.read("archive/data.pkl")
    RECORDS = {
        name.removeprefix("archive/data/"): _archive.read(name)
        for name in _archive.namelist()
        if name.startswith("archive/data/")
    }
EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 4)), max_size=4
)


@settings(max_examples=150)
@given(st.sampled_from(["pickle", "zip", "legacy"]), EDITS, st.none() | st.integers(0, 10**6))
def test_random_bytes_only_raise_our_errors(tmp_path_factory, kind, edits, cut):
    content = bytearray({"pickle": PICKLE, "zip": ZIP, "legacy": LEGACY}[kind])
    for where, new, gone in edits:
        where %= len(content) + 1
        content[where : where + gone] = new
    if cut is not None:
        del content[cut % (len(content) + 1) :]
    # In the zip the pickle's checksum is right, so that the machine sees what was done to it.
    written = zipped(bytes(content), RECORDS) if kind == "pickle" else bytes(content)
    path = tmp_path_factory.mktemp("fuzz") / "x.pth"
    path.write_bytes(written)
    try:
        touch_all(read_pth(path))
    except PthError as error:
        assert "\n" not in str(error)


def test_values_that_torch_cannot_store_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no storage class for dtype datetime64"):
        write_pth(tmp_path / "x.pth", np.zeros(1, "datetime64[s]"))
    with pytest.raises(ValueError, match=r"a set can't be written to a \.pth file"):
        write_pth(tmp_path / "x.pth", {"a": {1}})
    assert not list(tmp_path.iterdir())
