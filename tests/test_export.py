"""The hand-off: model cards from what is on record, ready commands, and uploads to a hub, which a server here stands for."""

import base64
import http.server
import json
import re
import shlex
import shutil
import threading

import pytest
import tiny
from huggingface_hub import ModelCard

from dail_jax import config as config_lib
from dail_jax.stages import card, check, experiment, export


@pytest.fixture(scope="module")
def handed(tmp_path_factory, pipeline):
    """A copy of the finished run, where it may be changed."""
    folder = tmp_path_factory.mktemp("handed") / "run"
    shutil.copytree(pipeline, folder)
    return tiny.write(folder)


def test_the_card_says_what_is_on_record(pipeline):
    content = (pipeline / "adapter" / "README.md").read_text()
    record = json.loads((pipeline / "run.json").read_text())["stages"]
    front = ModelCard(content).data.to_dict()
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["dail_jax", "dail", "lora"],
    }  # no name on a hub is known, and the licence is the user's to choose
    for name in ("model.path", "data.path"):
        assert f"SHA-256 `{record['train']['inputs'][name]['sha256']}`" in content
    assert "| data | 12 problems of train.jsonl, SHA-256" in content
    assert (
        "| train.gamma | `0.1` |" in content and "| generate.tau | `0.8` |" in content and "| seed | `5` |" in content
    )
    assert '"rank": 4' in content and '"learning_rate": 0.003' in content
    for benchmark, budgets in json.loads((pipeline / "results.json").read_text())["benchmarks"].items():
        found = budgets["96"]["pass@k"]["1"]
        row = next(line for line in content.splitlines() if line.startswith(f"| {benchmark} |"))
        shown = [float(number) for number in re.findall(r"[\d.]+", row.split("|")[3])]
        assert shown == pytest.approx([100 * found[key] for key in ("mean", "low", "high")], abs=0.051)
    assert "Sampled with `samples: 4`" in content
    assert str(tiny.ROOT) not in content.split("## Use")[0]


def test_a_card_is_refreshed_until_somebody_writes_their_own(handed, capsys):
    readme, run = handed.with_suffix("") / "adapter" / "README.md", handed.with_suffix("")
    first = readme.read_text()
    results = (run / "results.json").read_text()
    named = ("export.license=apache-2.0", "export.base_model=some/base", "title=A | title", "about=What it is.")
    config = config_lib.load(handed, named)
    (run / "results.json").rename(run / "kept.json")
    card.write(config)
    assert "It has not been evaluated in this run." in readme.read_text()
    (run / "kept.json").rename(run / "results.json")
    card.write(config)
    found = ModelCard(readme.read_text()).data.to_dict()
    assert (found["license"], found["base_model"], found["base_model_relation"]) == (
        "apache-2.0",
        "some/base",
        "adapter",
    )
    assert "# A \\| title" in readme.read_text() and "What it is." in readme.read_text()
    with tiny.alone():
        assert tiny.run("export", handed) == 0  # already done, and the folder still is what was written
    assert readme.read_text() == first and results == (run / "results.json").read_text()
    readme.write_text("Mine.")
    card.write(config)
    assert readme.read_text() == "Mine."
    readme.write_text(first)


def test_the_commands_name_what_was_written(handed, capsys, tmp_path):
    def of_rank(r):
        folder = tmp_path / "a b" / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": r}))
        return config_lib.load(handed, [f"run_dir={tmp_path}/a b"])

    config = of_rank(17)
    serve, grade = map(shlex.split, card.commands(config, "adapter", "runs/a b/adapter"))
    base = config.model.path
    assert serve == [
        "vllm",
        "serve",
        base,
        "--enable-lora",
        "--lora-modules",
        "a-b=runs/a b/adapter",
        "--max-lora-rank",
        "32",
    ]
    assert (
        grade[grade.index("--model_args") + 1] == f"pretrained={base},lora_local_path=runs/a b/adapter,max_lora_rank=32"
    )
    serve, grade = map(shlex.split, card.commands(config, "merged", "owner/name-merged"))
    assert serve == ["vllm", "serve", "owner/name-merged"]
    assert grade[grade.index("--model_args") + 1] == "pretrained=owner/name-merged"
    (only,) = card.commands(of_rank(513), "adapter", "a")
    assert only.startswith("# vLLM serves adapters up to rank 512")
    cached = config_lib.load(handed, ["model.path=/c/models--Own--Base-1.7B/snapshots/0a1b"])
    assert card.base_model(cached) == "Own/Base-1.7B"
    with tiny.alone():
        assert tiny.run("export", handed) == 0
    assert f"{handed.with_suffix('')}/adapter" in capsys.readouterr().out.split("vllm serve")[1]


def test_an_arm_has_a_repository_of_its_own(handed):
    arms = {"nll": {"train.objective": "nll"}, "k=1,2": {"export.push": "me/mine"}, "none": {"train.objective": "none"}}
    config = config_lib.load(handed, ["export.push=owner/name", f"arms={json.dumps(arms)}"])
    pushed = {name: experiment.arm(config, name).export.push for name in arms}
    assert pushed == {"nll": "owner/name-nll", "k=1,2": "me/mine", "none": "owner/name-none"}
    assert card.repository(config, "merged") == "owner/name-merged"
    export.upload(experiment.arm(config, "none"))  # nothing was trained, so there is nothing to upload


# ---------------------------------------------------------------------------------------------------
# A hub
# ---------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as an upload needs."""

    seen: list

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        self.seen.append((path, self.headers.get("Authorization"), body))
        if path == "/api/repos/create":
            return self.reply({"url": f"http://{self.headers['Host']}/owner/name", "name": "owner/name", "id": "1"})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self.reply(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if path.endswith("/commit/main"):
            where = f"http://{self.headers['Host']}/owner/name/commit/0"
            return self.reply({"success": True, "commitOid": "0", "commitUrl": where})
        return self.reply({"errors": [], "warnings": []})  # of the card's front matter

    def do_GET(self):
        self.reply({"id": "owner/name", "sha": "0", "siblings": []})

    def reply(self, tree):
        data = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    handler = type("Handler", (Hub,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield handler.seen
    server.shutdown()


def test_an_upload_is_the_folder_in_a_private_repository(handed, hub, capsys):
    with tiny.alone():
        assert tiny.run("export", handed, "export.push=owner/name") == 0
    assert f"pushed {handed.with_suffix('')}/adapter to " in capsys.readouterr().out
    created = next(json.loads(body) for path, _, body in hub if path == "/api/repos/create")
    assert created["name"] == "name" and created["organization"] == "owner"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert {token for _, token, _ in hub} == {"Bearer secret"}
    lines = next(body for path, _, body in hub if path.endswith("/commit/main")).splitlines()
    values = [json.loads(line) for line in lines]
    sent = {v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in values if v["key"] == "file"}
    folder = handed.with_suffix("") / "adapter"
    assert sent == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} < sent.keys()


@pytest.mark.parametrize(
    "variable, value, reason",
    [("HF_TOKEN", "", "there is no token: `hf auth login`"), ("HF_ENDPOINT", "http://127.0.0.1:1", "ConnectError: ")],
)
def test_without_a_token_or_a_network_the_folder_is_kept(handed, hub, capsys, monkeypatch, variable, value, reason):
    monkeypatch.setenv(variable, value)
    with tiny.alone():
        assert tiny.run("export", handed, "export.push=owner/name") == 2
    err, folder = capsys.readouterr().err, handed.with_suffix("") / "adapter"
    assert (
        err.startswith(f"error: {folder}:export.push: was not pushed to owner/name: {reason}") and err.count("\n") == 1
    )
    assert "secret" not in err and (folder / "adapter_model.safetensors").is_file() and not hub


def test_check_says_where_it_will_go(handed, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    other = [f"run_dir={tmp_path / 'new'}", "export.push=owner/name"]
    with tiny.alone():
        found = check.look("run", config_lib.load(handed, other))
    ((text,),) = (found.rows["push"].keys(),)
    assert text.startswith("owner/name, private; there is no token yet") and not found.problems
