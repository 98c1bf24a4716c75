"""A run directory on an object store: one owner, and nothing that a kill between two uploads can spoil."""

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import store as stores
import tiny

from dail_jax import config as config_lib
from dail_jax import launch, mirror, provenance, rundir, storage
from dail_jax.errors import Interrupted, UserError

URL = "s3://bucket/runs/one"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with stores.running(tmp_path_factory.mktemp("cache")) as store:
        yield store


@pytest.fixture
def place(server, tmp_path, monkeypatch):
    """An empty store, which everything is sent to at once, and the folder for the work."""
    server.failing = lambda method, key: False
    for key in server.keys(""):
        server.send("DELETE", key)
    monkeypatch.setenv(mirror.SCRATCH, str(tmp_path / "scratch"))
    environment = provenance.environment()
    monkeypatch.setattr(provenance, "environment", lambda: dict(environment))  # which asks git
    monkeypatch.setattr(mirror, "SECONDS", 0.0)
    monkeypatch.setattr(mirror, "BEAT", 0.1)
    monkeypatch.setattr(mirror, "LEASE", 1.0)
    return tmp_path / "scratch"


RECIPE = provenance.Recipe(
    "draw",
    {"seed": 1},
    {"data.path": provenance.Input("rows.jsonl", lambda _: "aaa")},
    (provenance.File("out.txt"), provenance.File("sum.json", derived=True)),
    partial=("draw.partial.jsonl",),
    scratch=("draw.partial.jsonl",),
)
ROWS = 3


def config(url=URL):
    return config_lib.build({"run_dir": url, "model": {"path": "m"}}, "test")


def work(drawn, url=URL):
    """A stage of three rows, one of which is added to `drawn` whenever it is made."""
    with mirror.opened(config(url)) as here, rundir.RunDir(here) as run_dir, run_dir.stage(RECIPE) as stage:
        if stage.done:
            return "done"
        journal = rundir.Journal(run_dir.path / "draw.partial.jsonl")
        for i in range(len(journal.rows), ROWS):
            drawn.append(i)
            journal.append({"i": i})
        rows = [row["i"] for row in rundir.Journal(journal.path).rows]
        journal.close()
        rundir.write_atomic(run_dir.path / "out.txt", f"{rows}\n" * 9_000)
        rundir.write_atomic(run_dir.path / "sum.json", json.dumps(sum(rows)))
        return "made"


def listed(server, prefix="runs/one"):
    """The rows of the journal that the index on the store lists."""
    keys = [key for key in server.keys(prefix) if key.endswith(mirror.INDEX)]
    files = json.loads(server.send("GET", keys[0]))["files"] if keys else {}
    return sum(server.send("GET", f"{prefix}/{mirror.PARTS}/{name}").count(b"\n") for name, _ in parts(files))


def parts(files):
    return files.get("draw.partial.jsonl", {}).get("parts", ())


def test_a_finished_run_is_on_the_store(server, place):
    drawn = []
    assert work(drawn) == "made" and drawn == [0, 1, 2]
    names = {key.removeprefix("runs/one/") for key in server.keys("runs/one")}
    assert names == {"run.json", "config.yaml", "out.txt", "sum.json", mirror.INDEX, mirror.OWNER}  # no part is left
    assert server.send("GET", "runs/one/out.txt") == b"[0, 1, 2]\n" * 9_000
    server.requests.clear()
    assert work(drawn) == "done" and not [r for r in server.requests if r[0] == "GET" and r[1].endswith("out.txt")]
    shutil.rmtree(place)  # another machine
    assert work(drawn) == "done" and drawn == [0, 1, 2]
    assert next(place.glob("*/one/out.txt")).read_bytes() == b"[0, 1, 2]\n" * 9_000
    server.send("DELETE", "runs/one/out.txt")  # as a user does who wants it made again
    assert work(drawn) == "made" and drawn == [0, 1, 2] * 2


def test_killed_between_any_two_uploads(server, place):
    """Whatever the last upload was, on another machine the run goes on, and what the index listed is not made again."""
    count, ends = 0, 0
    while not ends:
        prefix, url = f"runs/{count}", f"s3://bucket/runs/{count}"
        left, drawn = [count], []

        def failing(method, key, left=left):
            if key.endswith(mirror.OWNER):  # or the next one would wait for it to end
                return False
            left[0] -= method != "GET"
            return left[0] < 0

        server.failing = failing
        try:
            ends = work(drawn, url) == "made" and left[0] >= 0
        except UserError as error:
            assert "the store failed: 503" in str(error) and "\n" not in str(error)
        server.failing = lambda method, key: False
        safe = listed(server, prefix)
        shutil.rmtree(place)
        again = []
        assert work(again, url) == ("done" if ends else "made") or again == []
        assert again == list(range(safe, ROWS)) or again == []
        out = next(place.glob(f"*/{count}/out.txt"))
        assert out.read_text() == "[0, 1, 2]\n" * 9_000 and (out.parent / "sum.json").read_text() == "3"
        assert not [key for key in server.keys(prefix) if mirror.PARTS in key and "draw" in key] or not ends
        count += 1
    assert count > 12


def test_a_store_that_fails_now_and_then(server, place):
    turn = [0]

    def failing(method, key):
        turn[0] += 1
        return turn[0] % 3 == 0

    server.failing = failing
    drawn = []
    assert work(drawn) == "made" and work(drawn) == "done" and drawn == [0, 1, 2]


def test_a_second_run_is_refused_and_a_dead_one_replaced(server, place):
    """The second waits for a sign of life; one that was taken for dead can change nothing any more."""
    url = f"{URL}/shared"
    first = mirror.Mirror(url, place / "first", "machine 1")
    first.lease.take()
    first.bring()
    (first.folder / "a.txt").write_text("first")
    first.sync()
    second = mirror.Mirror(url, place / "second", "machine 2")
    with pytest.raises(
        UserError, match=rf"^{url}: in use by process \d+ of \S+: wait for it, or choose another run_dir$"
    ):
        second.lease.take()
    first.lease.ended.set()  # it hangs, or its machine is gone
    third = mirror.Mirror(url, place / "third", "machine 3")
    started = time.monotonic()
    third.lease.take()
    assert time.monotonic() - started >= mirror.LEASE
    third.bring()
    assert (third.folder / "a.txt").read_text() == "first"
    (third.folder / "a.txt").write_text("third")
    third.sync()
    (first.folder / "a.txt").write_text("it wakes up")
    (first.folder / "b.txt").write_text("it wakes up")
    with pytest.raises(UserError, match="in use by"):
        first.sync()
    assert server.send("GET", "runs/one/shared/a.txt") == b"third"
    assert server.keys("runs/one/shared/b.txt") == []
    third.lease.release()
    started = time.monotonic()
    fourth = mirror.Lease(url, "machine 4")
    fourth.take()  # at once
    assert time.monotonic() - started < mirror.LEASE
    fourth.release()


def test_of_several_that_start_together_one_works(server, place):
    won, lost = [], []

    def start(number):
        lease = mirror.Lease(f"{URL}/race", f"machine {number}")
        try:
            lease.take()
            won.append(lease)
        except UserError:
            lost.append(number)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 4
    won[0].release()


def test_a_lost_answer_is_no_other_owner(server, place):
    """A conditional write that was done, and is repeated because its answer was lost, finds itself."""
    url = server.put("answer", b"").replace("answer", "lost")
    version = storage.replace(url, b"one", None)
    assert version is not None and storage.replace(url, b"one", None) == version
    assert storage.replace(url, b"two", None) is None and storage.current(url) == (b"one", version)
    newer = storage.replace(url, b"three", version)
    assert newer is not None and storage.replace(url, b"four", version) is None
    storage.delete([url])
    assert storage.current(url) is None and storage.replace(url, b"five", newer) is None


def test_journals_go_on_or_are_written_anew(server, place, monkeypatch):
    """Whatever happens to them in between, they come out on another machine as they were."""
    monkeypatch.setattr(mirror, "TAIL", 6)
    monkeypatch.setattr(mirror, "MOST_PARTS", 3)
    url, rows = f"{URL}/journals", ["aaaa\n", "bb\n", "", "cc\ndd\n", "e\n", "f\n"]
    here = mirror.Mirror(url, place / "here", "machine 1")
    here.lease.take()
    here.bring()
    file, counts = here.folder / "metrics.jsonl", []

    def sent():
        here.sync()
        there = mirror.Mirror(url, place / "there", "machine 2")
        there.bring()
        assert (there.folder / "metrics.jsonl").read_bytes() == file.read_bytes()
        assert sorted(there._files()) == sorted(here._files())
        parts = here.sent["metrics.jsonl"].entry["parts"]
        assert len(server.keys(f"runs/one/journals/{mirror.PARTS}")) == len(parts)
        counts.append(len(parts))

    for row in rows:
        with open(file, "a") as journal:
            journal.write(row)
        sent()
    assert counts == [1, 2, 2, 3, 1, 2]  # joined
    for text in ("aaaa\nbb\nX\nlonger than it was before\n", "aaaa\n", "aaaa\nbb\n", ""):
        with open(file, "r+") as journal:  # in place: the same inode
            journal.truncate(0)
            journal.write(text)
        sent()
    assert counts[6:] == [1, 1, 2, 0]
    here.lease.release()


def test_two_folders_become_one(server, place):
    """References go to the other machine once they are complete, and leave the store where a single one works again."""
    url = f"{URL}/apart"
    first, other = (mirror.Mirror(url, place / name, "machine 1", apart=True) for name in ("first", "other"))
    first.lease.take()
    for one, part in ((first, "student.bin"), (other, "student.1.bin")):
        one.bring()
        (one.folder / "references").mkdir()
        (one.folder / "references" / part).write_text(part)
    (first.folder / "metrics.jsonl").write_text("a\n")
    (other.folder / "profile.pb").write_text("of the other")
    first.sync()
    assert set(first.sent) == {"metrics.jsonl"}  # the references are not complete yet
    first.accept(other.offer())
    other.bring()
    names = {"references/student.bin", "references/student.1.bin", "metrics.jsonl", "profile.pb"}
    for one in (first, other):
        assert set(one._files(shared=True)) == set(one.sent) == names and other.offer() == {}
        assert (one.folder / "references" / "student.1.bin").read_text() == "student.1.bin"
    (first.folder / "references" / "student.bin").write_text("being made anew")
    (first.folder / "profile.pb").unlink()
    first.sync()
    assert server.send("GET", "runs/one/apart/references/student.bin") == b"student.bin"
    other.bring()
    assert set(other._files(shared=True)) == names - {"profile.pb"}
    first.lease.release()
    alone = mirror.Mirror(url, place / "alone", "machine 2")
    alone.lease.take()
    alone.bring()
    assert set(alone._files()) == {"metrics.jsonl"} and not (alone.folder / "references").exists()
    alone.accept({})
    assert server.keys("runs/one/apart/references") == []
    alone.lease.release()


def test_where_others_are_at_work_a_failure_waits(server, place, monkeypatch):
    """The first process does not leave the others alone with what they compute: all are told when they next agree."""
    with pytest.raises(UserError, match="in use by"), mirror.opened(config()) as here:
        journal, interrupt = rundir.Journal(f"{here.run_dir}/draw.partial.jsonl"), rundir.Interrupt()
        journal.append({"i": 0})
        server.put(f"runs/one/{mirror.OWNER}", b"{}")  # another one has taken over
        with monkeypatch.context() as patch, interrupt:
            patch.setattr(mirror.jax, "process_count", lambda: 2)
            deadline = time.monotonic() + 10
            while not mirror.failed() and time.monotonic() < deadline:
                journal.append({"i": 1})
                time.sleep(0.02)
            patch.undo()
            assert interrupt.wanted
        journal.close()
        raise Interrupted("stopped")


def test_only_the_command_line_brings_a_run_directory_here():
    with pytest.raises(UserError, match="on this machine"):
        rundir.RunDir(config())


def test_a_preempted_run_goes_on_elsewhere(server, place, pipeline, tmp_path):
    """The real stages: everything that is read and the run directory on the store; each call on another machine."""
    assets = {name: server.put(f"assets/{name}", tiny.ASSETS / name) for name in ("model", "templates")}
    rows = server.put("assets/train.jsonl", (tiny.ASSETS / "train.jsonl").read_bytes())
    path = tiny.write(
        tmp_path / "run",
        model__path=assets["model"],
        data__path=rows,
        prompts__student=f"{assets['templates']}/student.txt",
    )
    there = "run_dir=s3://bucket/real"
    process = tiny.start("generate", path, there)
    parts, deadline = f"real/{mirror.PARTS}/traces.partial.jsonl", time.monotonic() + 120
    while not server.keys(parts) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, out, err = tiny.finish(process)
    assert status in (0, launch.STOPPED), err
    assert (status == 0) == ("run_dir: everything is in s3://bucket/real" in out)
    with tiny.alone():
        for stage in ("check", "generate", "train", "train"):
            shutil.rmtree(place, ignore_errors=True)
            assert tiny.run(stage, path, there) == 0
    assert server.send("GET", "real/traces.jsonl") == (pipeline / "traces.jsonl").read_bytes()
    folder = next(place.glob("*/real"))
    assert tiny.losses(folder) == tiny.losses(pipeline)
    kept = {p.relative_to(folder).as_posix() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    assert kept and {f"real/{name}" for name in kept} <= set(server.keys("real/checkpoints"))
    assert not Path("s3:").exists() and not (tmp_path / "run").exists()
