"""What is read from an object store, through a real client against a real server on this machine."""

import json
import sys

import jax
import numpy as np
import pytest
import store as stores
import tiny
from conftest import mesh_of
from safetensors import safe_open
from safetensors.numpy import save

from dail_jax import config as config_lib
from dail_jax import storage
from dail_jax.checkpoint import base, hf, ranges
from dail_jax.errors import UserError


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with stores.running(tmp_path_factory.mktemp("cache")) as store:
        yield store


@pytest.fixture(autouse=True)
def fresh(server):
    """Each test is a new process."""
    stores.forget()
    server.failing = lambda method, key: False
    server.requests.clear()


def complaint(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_is_fetched_once_and_checked(server, monkeypatch):
    monkeypatch.setattr(storage, "PIECE", 7)
    monkeypatch.setattr(storage, "BLOCK", 21)
    data = bytes(range(50))
    url = server.put("files/a.bin", data)
    copy = storage.file(url)
    assert copy.read_bytes() == data and str(copy).endswith("s3/bucket/files/a.bin")
    assert sorted(server.read()) == [("files/a.bin", at, min(7, 50 - at)) for at in range(0, 50, 7)]
    stores.forget()
    assert storage.file(url) == copy and server.read() == []  # the next process asks only whether it is the same
    copy.write_bytes(data[:-1])
    stores.forget()
    assert storage.file(url).read_bytes() == data and server.read()
    server.put("files/a.bin", data[::-1])
    stores.forget()
    assert storage.file(url).read_bytes() == data[::-1]
    assert storage.file("rows.jsonl") == storage.folder("rows.jsonl") == tiny.Path("rows.jsonl")


def test_a_folder_is_what_the_store_has_now(server):
    url = server.put("adapter/one.json", b"1").removesuffix("/one.json")
    server.put("adapter/deep/two.bin", b"2")
    root = storage.folder(f"{url}/")
    assert {p.name: p.read_bytes() for p in root.rglob("[!.]*.*")} == {"one.json": b"1", "two.bin": b"2"}
    server.send("DELETE", "adapter/one.json")
    stores.forget()
    assert storage.folder(url) == root and [p.name for p in root.rglob("[!.]*.*")] == ["two.bin"]
    assert (
        complaint(storage.folder, "s3://bucket/adapt") == "s3://bucket/adapt: nothing there: want the URL of a folder"
    )


def test_a_store_that_fails_now_and_then_is_asked_again(server):
    url = server.put("flaky", b"content")
    left = [3]

    def failing(method, key):
        left[0] -= 1
        return left[0] >= 0

    server.failing = failing
    assert storage.file(url).read_bytes() == b"content" and left[0] < 0
    server.failing = lambda method, key: True
    stores.forget()
    said = complaint(storage.file, url)
    assert said == "s3://bucket/flaky: the store failed: 503 Service Unavailable, after 6 retries"


def test_what_is_gone_or_replaced_or_not_allowed_is_said_in_one_line(server, monkeypatch):
    assert complaint(storage.file, "s3://bucket/none") == "s3://bucket/none: no such object on the store"
    url = server.put("changing", b"before")
    found = storage.look(url)
    server.put("changing", b"beyond")
    assert complaint(found.read, 0, 3) == f"{url}: was replaced on the store while it was read: call again"
    server.send("DELETE", "changing")
    assert complaint(found.read, 0, 3) == f"{url}: no such object on the store"
    assert "404 Not Found, NoSuchBucket" in complaint(storage.folder, "s3://other/x")
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert complaint(storage.file, url) == f"{url}: want the package obstore: pip install 'dail_jax[store]'"


def test_a_missing_login_is_named(server, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # where a virtual machine asks
    said = complaint(storage.file, "s3://bucket/x")
    assert "wants a login" in said and "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said


@pytest.mark.parametrize("url", ["gs://bucket", "s3://b/../x", "hf://a/b", "file:///x", "s3://b/x?y=1", "s3:///x"])
def test_urls_that_name_no_object_are_refused(url):
    assert not storage.is_known(url)
    said = complaint(config_lib.build, {"run_dir": "r", "model": {"path": url}}, "c.yaml")
    assert said == f"c.yaml:model.path: got {url!r}, {storage.WANTED}"


# ---------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------


def spans(file):
    """By tensor, where a safetensors file holds its bytes."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return {
        name: [8 + size + at for at in one["data_offsets"]] for name, one in header.items() if name != "__metadata__"
    }


def test_a_model_on_a_store_is_the_same_model(server):
    here = tiny.ASSETS / "model"
    url = server.put("model", here)
    folder = storage.model(url)
    assert not list(folder.glob("*.safetensors")) and sorted(storage.objects(folder)) == ["model.safetensors"]
    assert server.read() and base.check(folder, hf.read_config(folder)) is None
    assert sum(size for key, _, size in server.read() if key.endswith("safetensors")) < 10_000  # its header
    mesh = mesh_of(2, 2, 2)
    ours, _ = base.load(folder, mesh, "float32")
    theirs, _ = base.load(here, mesh, "float32")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))
    read = sorted((first, size) for _, first, size in server.read())
    wanted = sorted((a, b - a) for a, b in spans(here / "model.safetensors").values())
    assert read[:1] == [(0, 8)] and read[2:] == wanted  # the header, and every tensor once
    before = base.model_digest(folder, lambda path: "")
    weights = bytearray((here / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    server.put("model/model.safetensors", bytes(weights))
    assert "was replaced on the store" in complaint(base.load, folder, mesh, "float32")
    stores.forget()
    assert base.model_digest(storage.model(url), lambda path: "") != before


@pytest.mark.parametrize("index", [(slice(None)), slice(1, 3), slice(2, 2), (1, slice(1, 3)), (2, slice(0, 4))])
def test_rows_are_read_and_no_others(server, index):
    x = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
    url = server.put("x.safetensors", save({"first": np.zeros(3, np.float16), "x": x}))
    file = ranges.Tensors(storage.look(url)).tensors["x"]
    server.read()
    assert np.array_equal(file[index], x[index])
    assert sum(size for _, _, size in server.read()) == x[index].nbytes


GOOD = {
    "first": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]},
    "x": {"dtype": "F32", "shape": [3, 4, 5], "data_offsets": [6, 246]},
}
BAD = {
    "a list": ("want a JSON object", ["first"]),
    "not a tensor": ("describes no tensor 'x'", {**GOOD, "x": 5}),
    "no type": ("describes no tensor 'x'", {**GOOD, "x": {**GOOD["x"], "dtype": None}}),
    "no numbers": ("describes no tensor 'x'", {**GOOD, "x": {**GOOD["x"], "data_offsets": [6, True]}}),
    "one number": ("describes no tensor 'x'", {**GOOD, "x": {**GOOD["x"], "data_offsets": [6]}}),
    "backwards": ("describes no tensor 'x'", {**GOOD, "x": {**GOOD["x"], "data_offsets": [246, 6]}}),
    "another shape": ("is not what its shape and type say", {**GOOD, "x": {**GOOD["x"], "shape": [3, 4, 6]}}),
    "a gap": ("overlap, or leave gaps", {"x": GOOD["x"]}),
    "overlap": ("overlap, or leave gaps", {**GOOD, "y": GOOD["first"]}),
    "cut": ("the file is cut", {**GOOD, "y": {"dtype": "U8", "shape": [9], "data_offsets": [246, 255]}}),
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_headers_are_refused(server, kind):
    words, header = BAD[kind]
    text = json.dumps(header).encode()
    url = server.put("bad.safetensors", len(text).to_bytes(8, "little") + text + bytes(246))
    said = complaint(lambda: ranges.Tensors(storage.look(url)))
    assert said.startswith(url) and words in said


@pytest.mark.parametrize("data", [b"", b"12345", b"<html>not found</html>"])
def test_files_without_a_header_are_refused(server, data):
    url = server.put("bad.safetensors", data)
    assert "the file is cut, or no such file" in complaint(lambda: ranges.Tensors(storage.look(url)))


LOADING = """
import json, os, sys
os.environ["DAIL_JAX_CACHE"] = f"{sys.argv[6]}/cache-{sys.argv[2]}"
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from dail_jax import config, mesh as mesh_lib, storage
from dail_jax.checkpoint import hf
from dail_jax.errors import UserError
mesh = mesh_lib.make_mesh(config.Axes(data=1, fsdp=2, tensor=2))
out = open(f"{sys.argv[6]}/out-{sys.argv[2]}", "w")  # Gloo writes into the standard one
read = hf.Tensors.read
counts = {}

def counted(self, name, shape, rows=slice(None)):
    found = read(self, name, shape, rows)
    counts[name] = len(found), shape[0], found.nbytes
    return found

hf.Tensors.read = counted
for path in sys.argv[3:5]:
    counts.clear()
    params, cfg = hf.load(storage.model(path), mesh, "float32")
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).shape == leaf.sharding.shard_shape(leaf.shape)
    sums = jax.jit(lambda tree: jax.tree.map(lambda x: abs(x).sum(), tree))(params)
    print(json.dumps([counts, [float(x) for x in jax.tree.leaves(sums)]]), file=out)
try:
    hf.load(storage.model(sys.argv[5]), mesh, "float32")
except UserError as error:
    print(error, file=out)
out.close()
mesh_lib.barrier("both are here")
"""


def test_two_processes_read_the_weights_once(server, tmp_path):
    """From a disk and from a store by ranges: each reads half of every tensor, and has what one process has."""
    here = tiny.ASSETS / "model"
    with safe_open(here / "model.safetensors", "np") as file:
        url = server.put("model", here)
        broken = dict(zip(file.keys(), map(file.get_tensor, file.keys()), strict=True))
        broken["model.norm.weight"][-1] = np.nan  # in the half that the second process reads
        bad = server.put("bad/model.safetensors", save(broken)).removesuffix("/model.safetensors")
        server.put("bad/config.json", (here / "config.json").read_bytes())
        found = tiny.pair(LOADING, str(here), url, bad, str(tmp_path))
        assert [status for status, _, _ in found] == [0, 0], found
        one, two = ((tmp_path / f"out-{i}").read_text().splitlines() for i in range(2))
        whole = sum(x.nbytes for x in broken.values())
        sent = sum(size for key, first, size in server.read() if key == "model/model.safetensors" and first > 8)
        params, _ = hf.load(here, mesh_of(), "float32")
        sums = [float(np.abs(np.asarray(x)).sum()) for x in jax.tree.leaves(params)]
    for line, other in zip(one[:2], two[:2], strict=True):
        (counts, mine), (rest, theirs) = json.loads(line), json.loads(other)
        assert counts.keys() == rest.keys() == broken.keys()
        for name in counts:
            assert counts[name][0] + rest[name][0] == counts[name][1] and 0 <= counts[name][0] - rest[name][0] <= 1
        halves = [sum(size for _, _, size in each.values()) for each in (counts, rest)]
        assert sum(halves) == whole and max(halves) < 0.501 * whole
        np.testing.assert_allclose(mine, sums, rtol=1e-5)
        assert mine == theirs
    assert sent == whole  # and nothing twice
    assert one[2] == two[2] and "bad/model.safetensors:model.norm.weight: got NaN or infinity" in one[2]
