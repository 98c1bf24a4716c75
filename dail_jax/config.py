"""The configuration: every hyper-parameter of every stage, typed, frozen, and read from YAML.

`load(path, overrides)` is the way in. Unknown keys fail and name the nearest known one; numbers such as
`1e-5` are numbers (YAML 1.2); duplicate keys, aliases, tags and non-finite values are refused. Relative
paths are relative to the working directory; `pkg:NAME` is a file that comes with the package. Defaults live here and
nowhere else.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML

from dail_jax import resources, storage
from dail_jax.errors import UserError
from dail_jax.strict_yaml import as_user_error, assign, included, lay_over, parse_yaml, read_yaml


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # which Python takes for 0 or 1
        raise ValueError("want a number")
    return value


Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
Natural = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]
Seed = Annotated[Natural, Field(lt=1 << 32)]  # all that JAX takes of it


def _located(path: str) -> str:
    if storage.is_remote(path) and not storage.is_known(path):
        raise ValueError(storage.WANTED)
    return path.rstrip("/") if storage.is_remote(path) else resources.locate(path)


# Of a file or folder on this machine or on an object store.
AnyPath = Annotated[str, AfterValidator(_located), WithJsonSchema({"type": "string", "format": "path"})]


HubName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """A frozen part of the configuration. The docstring below each key is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(Section):
    """The frozen base model: a Hugging Face folder with config.json, safetensors and a tokenizer."""

    path: AnyPath
    """The model's folder."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights and of the computation. bfloat16 halves memory; float32 is for small models and for tests."""
    quantize: Literal["int8"] | None = None
    """How the matrices are held: int8, with one scale per output channel, takes half the memory of bfloat16 and changes
    log-probabilities a little (`dail quantization` says how much); null = exactly, in `dtype`."""
    tokenizer: AnyPath | None = None
    """A folder with another tokenizer; null = the model's own."""
    title: str | None = None
    """What the report calls the model; null = its folder's name."""


class Axes(Section):
    """Devices per mesh axis. The product must be the number of devices; at most one axis may be -1, which takes the
    devices that are left."""

    data: int = -1
    """Devices along which batches are split and weights are repeated. By default all of them: right for models that
    fit on one device."""
    fsdp: int = 1
    """Devices along which batches and weights are both split; weights are gathered layer by layer."""
    tensor: int = 1
    """Devices along which heads, feed-forward width and vocabulary are split."""

    @model_validator(mode="after")
    def _axes(self):
        sizes = [self.data, self.fsdp, self.tensor]
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError("axis sizes must be positive, and at most one may be -1")
        return self


def _axes(value: Any) -> Any:
    """A mapping as a section, so that what is wrong inside of it is found there."""
    if not isinstance(value, (dict, Axes)) and value not in (None, "auto"):
        raise ValueError("want devices per axis, or auto")
    return Axes.model_validate(value) if isinstance(value, dict) else value


class Mesh(Axes):
    """Devices per mesh axis, and other meshes of the same devices for sampling and for training. Sampling wants weights
    that are split along `tensor`, not gathered for every token; training wants them split along `fsdp`. The frozen
    weights are laid out anew, on the devices, where one follows the other. No result depends on any of it. `mesh: auto`
    makes both of them `auto`."""

    sample: Annotated[Axes | Literal["auto"] | None, BeforeValidator(_axes)] = None
    """Devices per axis while sampling; null = as above; auto = those that fit and sample fastest, by estimate."""
    train: Annotated[Axes | Literal["auto"] | None, BeforeValidator(_axes)] = None
    """Devices per axis while training; null = as above; auto = those that fit and exchange least, by estimate."""

    @property
    def for_sampling(self) -> Axes:
        return self._chosen(self.sample)

    @property
    def for_training(self) -> Axes:
        return self._chosen(self.train)

    def _chosen(self, own: Axes | str | None) -> Axes:
        assert not isinstance(own, str), "a mesh that is auto is chosen before it is made (stages.auto)"
        return own or self


def _both(value: Any) -> Any:
    return {"sample": "auto", "train": "auto"} if value == "auto" else value


class Columns(Section):
    """The dataset's names for the fields that are read."""

    problem_id: str = "problem_id"
    """Column of the id, which must be unique. Where a row has none, a hash of its content takes its place."""
    problem: str = "problem"
    """Column of the problem's text."""
    messages: str = "messages"
    """Column of a chat, a list of `{role, content}`, read where a row has no `problem`: the last user's turn is the problem
    (docs/data.md)."""
    solution: str = "solution"
    """Column of the expert solution: text, or a list where a problem has several."""
    answer: str = "answer"
    """Column of the final answer. A training row without one has the answer that its solution ends in."""
    waypoints: str = "waypoints"
    """Column of the row's own waypoints, a list or text with one per line, which take the place of the extractor's. Of
    several solutions, a list of lists gives each its own."""
    choices: str | tuple[str, ...] | None = None
    """Multiple choice: one column with a list of 2 to 26 texts, or a list of columns with one text each."""


class HoldOut(Section):
    """Rows that are kept out of training, for a benchmark with `rows: held_out` to evaluate on."""

    rows: Count
    """How many rows to keep out."""
    seed: Seed = 0
    """Which rows: each seed draws others, whatever the order of the file."""
    use: Literal["rest", "held_out"] = "rest"
    """Which of the two parts to read; `rows: held_out` in a benchmark sets it."""


class Source(Section):
    """One of several files."""

    path: AnyPath
    """The file, or the name on the hub or of another source."""
    weight: Positive | None = None
    """The file's share of all rows, relative to the other weights (docs/data.md); null = all its rows. Either every file
    has a weight, or none has."""


class Dataset(Section):
    """A dataset: a .jsonl or .parquet file or several, `hub:NAME` through the extra `hub`, or a source of your own."""

    path: Annotated[
        Annotated[AnyPath, Tag("[one]")] | Annotated[tuple[Source, ...], Tag("[several]")],
        Discriminator(lambda value: "[several]" if isinstance(value, (list, tuple)) else "[one]"),
    ]
    """The file; or `hub:NAME` or `hub:NAME:SUBSET` for a dataset on the hub, or another SOURCE:NAME; or a list of these,
    as in `[{path: a.jsonl, weight: 3}, {path: b.jsonl, weight: 1}]`."""
    seed: Seed = 0
    """Which rows are taken of files with weights."""
    split: str = "train"
    """Split of a dataset on the hub; files have none."""
    columns: Columns = Columns()
    """The dataset's names for the fields that are read."""
    size: Count | None = None
    """About how many rows it has, for `plan`, which counts them where this is null; it changes nothing else."""
    limit: Count | None = None
    """Rows to read, from the first; of files with weights, rows in all; null = all."""
    hold_out: HoldOut | None = None
    """Rows to keep out of training; null = none."""
    special_tokens: Literal["text", "keep", "refuse"] = "text"
    """What to do with control tokens in a row, such as `<|im_end|>` or `</think>`, which would end a turn or a thought.
    `text` encodes them as the plain text they are in the row, `keep` as control tokens, `refuse` is an error."""

    @model_validator(mode="after")
    def _files(self):
        if isinstance(self.path, str):
            return self
        if not self.path:
            raise ValueError("path: got an empty list, want at least one file")
        if len({source.weight is None for source in self.path}) > 1:
            raise ValueError("path: either every file has a weight, or none has")
        if len({source.path for source in self.path}) < len(self.path):
            raise ValueError("path: got the same file twice, want each once")
        return self

    @property
    def shown_path(self) -> str:
        """Where the rows come from, in words: `3 of a.jsonl, 1 of b.jsonl` for files with weights."""
        if isinstance(self.path, str):
            return self.path
        return ", ".join(f"{one.weight:g} of {one.path}" if one.weight else one.path for one in self.path)


class Data(Dataset):
    """The rows that are trained on."""

    about: str = ""
    """Sentences for the report: how its problems, solutions and traces are read."""

    answer: str = "math"
    """How their answers are read and compared, for `filters.correct`, rewards, `calibrate` and `select`: `math`,
    `integer`, `choice`, or a name of your own in `dail_jax/evaluate/answers.py`."""


class Prompts(Section):
    """Templates of the roles' prompts, and how long a solution in them may be."""

    student: AnyPath | None = None
    """Template file of the student's prompt; null = the package's own."""
    privileged: AnyPath | None = None
    """Template file of the privileged student's prompt, which shows the solution; null = the package's own."""
    negative: AnyPath | None = None
    """Template file of the negative reference's prompt, which shows the waypoints; null = the package's own."""
    expert: AnyPath | None = None
    """Template file of the reply that SFT imitates; null = the solution as it is."""
    hint: AnyPath | None = None
    """Template file of the student's prompt with a hint, for nurl; null = the package's own."""
    opening: str = ""
    """Text that the assistant's turn starts with, such as `"<think>\\n"` for a thinking model."""
    max_solution_tokens: Count | None = None
    """Tokens that a solution is cut to, for every role alike; null = cut only where the privileged student's prompt
    would exceed `generate.max_prompt_tokens`, a limit that always holds."""


class Waypoints(Section):
    """How the negative reference's waypoints are taken from a solution."""

    extractor: str = "math"
    """Name of the extractor: math (results of formulas), text (salient statements), reference (the reference
    implementation's patterns), file (the column `waypoints`), or one of your own."""
    limit: Natural = 0
    """Waypoints to keep per solution, spread evenly over all of them; 0 = all."""


class Sampling(Section):
    """How tokens are drawn: the temperature is applied first, then top-k, then top-p."""

    temperature: NonNegative = 1.0
    """Divides the logits; 1 is the model's own distribution, 0 is greedy decoding."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Keeps the fewest likeliest tokens that hold this share of the probability; 1 keeps all."""
    top_k: Natural = 0
    """Keeps this many of the likeliest tokens; 0 keeps all."""
    presence_penalty: Number = 0.0
    """Subtracted from the logit of every token that the response already contains; 0 switches it off."""
    max_tokens: Count = 256
    """Tokens per response at most, the stop token included; a response that reaches it is cut."""
    suppress: tuple[str, ...] = ()
    """Texts of single tokens that are never drawn, such as `</think>` while traces of a thinking model are made."""

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return (self.temperature, self.top_p, self.top_k, self.presence_penalty, self.suppress) == (1, 1, 0, 0, ())


def _server_url(url: str) -> str:
    parts = urlsplit(url)
    _ = parts.port  # raises ValueError for one that cannot be
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.path.strip("/"):
        raise ValueError("want where an API begins, such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "want a URL without a user, a key or a query: key_variable names a variable that holds the key"
        )
    return url.rstrip("/")


class Server(Section):
    """A server with OpenAI's completions API, such as vLLM or SGLang, which draws the samples (docs/servers.md)."""

    url: Annotated[str, AfterValidator(_server_url)]
    """Where its API begins, such as `http://localhost:8000/v1`."""
    model: str
    """Name under which it serves the model, or the model with the adapter."""
    prompts: Literal["ids", "text"] = "ids"
    """How prompts are sent: as token ids, with the fields that vLLM and SGLang add to OpenAI's API; or as text, with
    OpenAI's own fields and no others."""
    concurrency: Count = 64
    """Requests that are open at the same time; each asks for one sample."""
    timeout: Positive = 3600.0
    """Seconds that a response may take before it is asked for again. On a busy server, long ones take many minutes."""
    retries: Natural = 8
    """Times that a request is repeated, after growing pauses, if the connection breaks, the server is overloaded or
    fails, or what it sends is not a response."""
    key_variable: str | None = None
    """Name of the environment variable that holds the API key; null = none is sent."""


def _sampler(value: Any) -> Any:
    """A mapping as a server, so that what is wrong inside of it is found there."""
    if not isinstance(value, (str, dict, Server)):
        raise ValueError("want a name, or the url and the model of a server")
    return Server.model_validate(value) if isinstance(value, dict) else value


def _engine_or_server(value: Any) -> Any:
    if isinstance(value, str) and value != "engine":
        raise ValueError("want engine, or the url and the model of a server")
    return _sampler(value)


class Inference(Section):
    """What everything that draws samples has in common: `generate`, `evaluate`, and online training."""

    slots: Count | Literal["auto"] = 64
    """Responses drawn at the same time. More use the device better and take memory for their caches; the samples are
    the same whatever the number. auto = as many as fit and have work, by estimate."""
    pages: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Lets keys and values lie in pages, which samples take as they grow: a token reads its own text and not the room for
    the longest, and the pages are this share of what all slots' longest texts would fill. Where none is left, the
    youngest samples are given up and drawn again, the same. null = every slot has room for the longest. For TPUs, where a
    model's heads have 128 channels, and for NVIDIA GPUs (docs/performance.md)."""
    kv_dtype: Literal["int8"] | None = None
    """Type of the keys and values that are kept while sampling: int8, with a scale per token and head, takes half the memory
    and traffic of bfloat16, and changes log-probabilities (docs/performance.md says how much); null = `model.dtype`."""
    max_prompt_tokens: Count = 4096
    """Tokens per prompt at most; problems with a longer prompt are skipped and counted."""
    sampling: Sampling = Sampling()
    """How tokens are drawn; by default from the model's own distribution."""

    @property
    def slot_count(self) -> int:
        assert not isinstance(self.slots, str), "slots that are auto are chosen before they are used (stages.auto)"
        return self.slots


class Generate(Inference):
    """Mixed policy rollouts (arXiv 2602.02405, section 3), which the student and the privileged student write together."""

    tau: Fraction = 0.8
    """Probability from which the privileged student accepts a token that the student proposes. 0 is the student alone,
    1 the privileged student alone. 0.8 is the paper's value for thinking models; `calibrate` compares others."""
    proposals: Count = 1
    """Tokens that the student may propose at each position before the privileged student writes one itself."""
    samples: Count = 1
    """Traces to draw per problem. Draw more where `filters.correct` selects among them."""
    sampler: Annotated[Literal["engine"] | Server, BeforeValidator(_engine_or_server)] = "engine"
    """What draws the traces: our engine, or a server, which can do so where one role writes them alone
    (`generate.tau` 0 or 1)."""

    @model_validator(mode="after")
    def _alone(self):
        if isinstance(self.sampler, Server) and self.tau not in (0, 1):
            raise ValueError("a server draws for one role alone, without the other's probabilities: want tau 0 or 1")
        return self


class Filters(Section):
    """Which traces are trained on. Every drop is counted under its reason."""

    correct: bool = False
    """Drop traces whose answer is wrong; every row then needs one."""
    finished: bool = False
    """Drop traces that were cut at `generate.sampling.max_tokens`."""
    artefacts: tuple[str, ...] = (
        "reference solution",
        "provided solution",
        "given solution",
        "solution provided",
        "solution above",
        "the expert",
        "the hint",
    )
    """Phrases, in any case, that give away that a solution was shown; traces with one are dropped. `[]` drops none, as
    in the paper."""
    max_repetition: Fraction = 0.5
    """Share of a trace's 8-grams of tokens that may be repeats before it is dropped; 1 drops none, as in the paper."""
    min_tokens: Count = 1
    """Tokens that a trace must have; shorter ones are dropped."""
    also: tuple[str, ...] = ()
    """Further filters to apply, by their names in `dail_jax/data/filters.py`."""
    keep: Count | Literal["all"] = 1
    """Traces to keep per problem among those that nothing else drops."""
    choose: Literal["first", "random"] = "first"
    """Which of them to keep: the first in order of samples, or some that the run's seed chooses."""


class LoraConfig(Section):
    """Low-rank adapters, the same on every layer. The defaults are the paper's."""

    rank: Count = 32
    """Rank of each adapter."""
    alpha: Positive = 32.0
    """Scale: an adapter's output is multiplied by alpha / rank."""
    use_rslora: bool = False
    """Rank-stabilised LoRA (arXiv 2312.03732): multiplied by alpha / sqrt(rank) instead, so that high ranks learn too."""
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down", "in_qkv", "in_z", "in_b", "in_a", "out"], ...] = (
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    )
    """Linear maps that get an adapter. Those from `in_qkv` on are a gated delta net's, such as Qwen3.5's."""

    @model_validator(mode="after")
    def _some(self):
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError("targets must be a non-empty list without repeats")
        return self

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Optimizer(Section):
    """Adam with decoupled weight decay behind clipping by the global norm, or Muon on matrices. Rates, warm-up and decay
    are the paper's by default."""

    name: Literal["adamw", "muon"] = "adamw"
    """The optimiser; `muon` uses Muon on matrices and Adam on the rest, in the stage `pretrain` alone."""
    learning_rate: Positive = 2e-4
    """Peak learning rate; 2e-4 is the paper's for a LoRA. Reinforcement learning (grpo, nurl) wants about a tenth."""
    matrix_learning_rate: Positive = 0.02
    """Peak learning rate of Muon for matrices."""
    warmup_steps: Natural = 5
    """Updates over which the rate rises linearly to its peak."""
    schedule: Literal["linear", "constant", "trapezoid"] = "linear"
    """What the rate does after the warm-up: falls linearly to 0, stays, or stays and falls to 0 at the end."""
    decay_fraction: Fraction = 0.3
    """Share of all updates over which a `trapezoid` falls."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, multiplied by the learning rate."""
    b1: BelowOne = 0.9
    """Decay of Adam's average of gradients."""
    b2: BelowOne = 0.999
    """Decay of Adam's average of squared gradients."""
    clip: Positive = 1.0
    """Global norm that gradients are scaled down to where theirs is larger."""


class Online(Inference):
    """For methods that learn from what the student writes while it trains: a round samples, grades, and makes its
    updates."""

    problems: Count = 16
    """Problems per round."""
    group: Count = 8
    """Samples per problem and round. problems * group must be a multiple of `train.batch_size`."""
    clip_ratio: Positive = 0.2
    """How far a token's probability ratio may leave 1 before its gradient is cut off (grpo, nurl); 0.2 is PPO's usual
    value."""
    kl_weight: NonNegative = 0.01
    """Weight of KL(student || frozen base), over the full vocabulary (grpo, nurl)."""
    hint: Literal["trace", "waypoints"] = "trace"
    """What a hint is (nurl): the beginning of a trace that `generate` wrote, or the solution's waypoints."""
    hint_tokens: Count = 64
    """Tokens of a trace in a hint, and never more than half of the trace (nurl)."""


class Train(Section):
    """Training of the LoRA: an `objective`, for `epochs` passes over what it learns from.

    The objectives, and what each of them learns from, are the table `METHODS` in `dail_jax/train/methods.py`.
    """

    objective: str = "dail"
    """Name of the method: dail, onpolicy, gated, sharp, nll, sft, star, grpo, nurl, none (the untrained model), or one of
    your own."""
    gamma: NonNegative = 0.1
    """Weight of the negative reference (dail, onpolicy, gated, sharp); 0.1 is the paper's. Reverse KL, gated and sharp need
    gamma below 1."""
    kl: Literal["reverse", "forward"] = "reverse"
    """Direction of the divergences (dail, onpolicy, gated): reverse is KL(student || reference), the paper's."""
    loss: dict[str, Number] = {}
    """Further numbers, by name, which a method declares as its settings. gated reads `epsilon`, between 0 and 1: what the
    student gives less than this is raised (default 0.01). sharp reads `temperature`, above 0 and at most 1: how sharp its
    target is (default 0.2; less is sharper). Methods of your own declare theirs."""
    reduce: Literal["token", "sequence"] = "token"
    """What an update averages: all its tokens alike, or its sequences' own means, as the reference implementation does."""
    epochs: Count = 3
    """Passes over the examples; for online methods, over the problems."""
    batch_size: Count = 16
    """Sequences per update."""
    accumulate: Count = 1
    """Micro-batches per update; more take less memory. Must divide `batch_size`."""
    max_tokens: Count = 2048
    """Tokens of prompt and response together; longer examples are dropped and counted."""
    bucket: Count = 64
    """Prompts and responses are padded to multiples of this many tokens."""
    shapes: Count = 8
    """The most widths that batches are padded to: of these multiples, those that pad least; where samples are drawn while
    training, those that would pad assumed lengths least. Each is a program to compile, and the frozen roles' states have
    as many again. More widths pad less; losses agree up to rounding."""
    chunk: Count = 1024
    """Response tokens whose logits exist at one time. Fewer take less memory and more time."""
    remat: Literal["none", "full", "dots"] = "full"
    """What the backward pass recomputes: nothing, whole layers (least memory), or all but the matrix products."""
    cache_references: bool = True
    """Whether the frozen roles' states are computed once, kept on disk, and reused in every epoch: exact, and faster."""
    references_gib: Positive = 64.0
    """Disk space in GiB that these states may take; where they need more, they are computed in every step."""
    workers: Natural = 0
    """Processes that assemble batches; 0 = the training process does, which is enough unless devices wait for it."""
    save_every: Count = 50
    """Updates between checkpoints."""
    keep_checkpoints: Count = 2
    """Checkpoints to keep: with two, damage to the newest costs `save_every` updates and no more."""
    max_skipped: Count = 5
    """Non-finite updates in a row after which training gives up; each of them is skipped and leaves the weights alone."""
    lora: LoraConfig = LoraConfig()
    """The adapters that are trained."""
    optimizer: Optimizer = Optimizer()
    """The optimiser and its schedule."""
    online: Online = Online()
    """Sampling during training, for methods that learn from the student's own samples."""

    @model_validator(mode="after")
    def _divides(self):
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        return self


class Force(Section):
    """The forced answer of a sample that holds no complete one. Thoughts that are still open are closed first, so that
    one text serves models that think and models that do not."""

    text: str = "\n\nThe final answer is \\boxed{"
    """Text that asks for the answer."""
    max_tokens: Count = 100
    """Tokens that may be drawn after it; 100 is the reference implementation's value."""

    @field_validator("text")
    @classmethod
    def _leaves_thoughts_alone(cls, text: str) -> str:
        if "</" in text:
            raise ValueError("want a text without a closing tag: thoughts that are still open are closed before it")
        return text


class Benchmark(Section):
    """One evaluation set, here or in a file of its own: `{from: FILE}`; keys beside `from` replace the file's."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Name in tables and result files."""
    rows: Dataset
    """The problems, with their gold answers."""
    template: AnyPath | None = None
    """Template file of the prompt; null = the student's, or with choices the package's own for these."""
    answer: str = "math"
    """Name of the answer type: math, integer, choice, none (nothing is graded), or one of your own. `choice` shows
    `rows.columns.choices` in an order of each question's own and grades the letter; the gold answer is then the right
    choice's text or letter, or its index from 0."""
    ungradable: Literal["refuse", "skip"] = "refuse"
    """What to do with rows whose gold answer cannot be read: stop with an error, or skip and count them."""
    title: str | None = None
    """What the report calls it; null = its name."""
    about: str = ""
    """A sentence for the report: what its problems are."""
    pool: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Name of a further row of the tables, over the problems of all benchmarks with this pool; null = none."""


class Evaluate(Inference):
    """pass@k with n samples per problem, cut at each of `budgets`."""

    sampling: Sampling = Sampling(temperature=0.6, top_p=0.95, presence_penalty=1.5, max_tokens=4096)
    """How tokens are drawn; the defaults are those of the paper's evaluation."""
    benchmarks: tuple[Annotated[Benchmark, BeforeValidator(included)], ...] = ()
    """The evaluation sets."""
    adapter: AnyPath | None = None
    """A PEFT folder to evaluate, with `train.objective: none`; null = what this run trained."""
    sampler: Annotated[str | Server, BeforeValidator(_sampler)] = "engine"
    """What draws the samples: `engine`, which is ours; a server; `offline`, a script for vLLM that `export` writes and
    that you run (docs/servers.md); or a name of your own (docs/extending.md)."""
    samples: Count = 128
    """Samples per problem; 128 is the paper's number."""
    ks: tuple[Count, ...] = ()
    """Values of k in pass@k, none above `samples`; `[]` = powers of two up to `samples`."""
    budgets: tuple[Count, ...] = ()
    """Token budgets that every sample is cut at, none above `sampling.max_tokens`; `[]` = that one alone."""
    budget: Literal["thoughts", "all"] = "all"
    """What a budget covers: every token of a reply, or the thoughts alone, as in the paper. With `thoughts`, a reply
    whose thoughts end within the budget has `force.max_tokens` more for its answer. A reply without thoughts is covered
    as a whole either way."""
    force: Force | None = None
    """How a reply that is left without a complete answer is asked for one; null = it is not."""
    bootstrap: Count = 2000
    """Resamples of the problems for the 95% intervals."""

    @model_validator(mode="after")
    def _consistent(self):
        if any(k > self.samples for k in self.ks):
            raise ValueError(f"ks must not exceed samples ({self.samples})")
        if any(b > self.sampling.max_tokens for b in self.budgets):
            raise ValueError(f"budgets must not exceed sampling.max_tokens ({self.sampling.max_tokens})")
        if self.budget == "thoughts" and self.force is None:
            raise ValueError("budget: thoughts wants force, whose max_tokens are the answer's")
        if len({b.name for b in self.benchmarks}) != len(self.benchmarks):
            raise ValueError("benchmark names must differ")
        if pools := {b.pool for b in self.benchmarks} & {b.name for b in self.benchmarks}:
            raise ValueError(f"got {sorted(map(str, pools))[0]!r} as a pool and as a benchmark, want names that differ")
        if any(b.pool is not None and b.answer == "none" for b in self.benchmarks):
            raise ValueError("a pool's benchmarks must be graded: answer: none has no verdicts to pool")
        return self

    @property
    def cuts(self) -> list[int]:
        """The budgets, rising."""
        return sorted(set(self.budgets)) or [self.sampling.max_tokens]

    @property
    def room(self) -> int:
        """Tokens for an answer that the budget does not cover."""
        return self.force.max_tokens if self.budget == "thoughts" and self.force is not None else 0

    @property
    def longest(self) -> int:
        """Tokens that a sample is drawn to, which all budgets are cut from."""
        return self.cuts[-1] + self.room


class Export(Section):
    """What `export` writes besides the PEFT adapter, and where it takes it."""

    merged: bool = False
    """Whether to write the whole model with the adapter merged into its weights, as `merged/`."""
    base_model: HubName | None = None
    """The base model's name on a hub, for the model card; null = by its folder in the hub's cache, if it is there."""
    license: str | None = None
    """The licence that the model card names, such as `apache-2.0`; null = none: the choice is yours."""
    push: HubName | None = None
    """Repository on a hub that the adapter is uploaded to, as `owner/name`, once there are results; the merged model goes to
    `owner/name-merged`, an arm's to `owner/name-ARM`. Wants a token (`hf auth login`, or HF_TOKEN); null = none."""
    private: bool = True
    """Whether a repository that does not exist yet is made private."""


class Pretrain(Section):
    """Training all weights of a small model on rows with `prompt` and `response`."""

    rows: AnyPath
    """A .jsonl file of rows with `prompt` and `response`."""
    architecture: dict[str, Any]
    """The config.json of the model to train."""
    init: AnyPath | None = None
    """A Hugging Face folder of this architecture, whose weights training starts from; null = random weights."""
    steps: Count = 1000
    """Updates."""
    tokens_per_step: Count = 4096
    """Tokens per update, padding included, roughly."""
    bucket: Count = 16
    """Rows are padded to multiples of this many tokens."""
    max_tokens: Count = 256
    """Tokens of prompt and response together; longer rows are left out."""
    log_every: Count = 20
    """Updates between rows of metrics.jsonl."""
    save_every: Count = 500
    """Updates between checkpoints."""
    optimizer: Optimizer = Optimizer(name="muon", learning_rate=3e-3, schedule="trapezoid", weight_decay=0.0)
    """The optimiser and its schedule; the defaults are those of the embedded model."""


class Log(Section):
    """How progress is shown, and where metrics go besides metrics.jsonl."""

    every: Positive = 30.0
    """Seconds between lines about the progress of a stage where there is no terminal to show a bar on."""
    tensorboard: bool = False
    """Whether to write TensorBoard event files into the run directory."""
    wandb: str | None = None
    """Project on Weights & Biases; null = none."""
    profile: dict[Literal["from", "steps"], Count] | None = None
    """Updates of training to trace with JAX's profiler: `{from: 10, steps: 3}` writes updates 10 to 12 to `profile/` in the run
    directory, for XProf or TensorBoard; null = none."""

    @field_validator("profile")
    @classmethod
    def _both(cls, profile: dict[str, int] | None):
        if profile is not None and len(profile) < 2:
            raise ValueError("want both from, the first update, and steps")
        return profile


class Config(Section):
    """The whole configuration: one file configures one experiment, and `arms` turns it into several that share traces."""

    run_dir: AnyPath
    """Directory that everything is written to; a second call with it resumes. It may be a URL such as
    `gs://bucket/run`."""
    title: str | None = None
    """What the report calls the experiment or, among the changes of an arm, the arm; null = the name of its folder."""
    about: str = ""
    """A sentence for the report: what the experiment is or, among the changes of an arm, what sets the arm apart."""
    seed: Seed = 3407
    """Seed of everything that is random; 3407 is the paper's."""
    model: Model
    """The frozen base model."""
    mesh: Annotated[Mesh, BeforeValidator(_both)] = Mesh()
    """How devices share the work."""
    data: Data | None = None
    """The training problems with their expert solutions; null = none, for stages that need none."""
    prompts: Prompts = Prompts()
    """Templates of the roles' prompts."""
    waypoints: Waypoints = Waypoints()
    """The negative reference's waypoints."""
    generate: Generate = Generate()
    """Mixed policy rollouts."""
    traces: AnyPath | None = None
    """A traces.jsonl made elsewhere; null = this run's own."""
    filters: Filters = Filters()
    """Which traces are trained on."""
    train: Train = Train()
    """Training of the LoRA."""
    evaluate: Evaluate = Evaluate()
    """The evaluation."""
    export: Export = Export()
    """What is exported."""
    pretrain: Pretrain | None = None
    """Training a small model from scratch, for the stage `pretrain` alone; null = none."""
    log: Log = Log()
    """Where metrics go besides metrics.jsonl."""
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_,=-][A-Za-z0-9_.,=-]*$")], dict[str, Any]] = {}
    """Variants of this configuration that `run` works through: by name, the keys to replace, as in
    `{nll: {train.objective: nll}}`. Over an arm of another file, `name: null` takes it away."""

    @model_validator(mode="before")
    @classmethod
    def _held_out(cls, tree: Any) -> Any:
        """A benchmark with `rows: held_out` reads what `data.hold_out` keeps out of training."""
        data, evaluate = tree.get("data"), tree.get("evaluate")
        listed = evaluate.get("benchmarks") if isinstance(evaluate, dict) else None
        if not isinstance(listed, (list, tuple)):
            return tree
        wanted = [isinstance(one, dict) and one.get("rows") == "held_out" for one in listed]
        if any(wanted) and not (isinstance(data, dict) and isinstance(data.get("hold_out"), dict)):
            raise ValueError("a benchmark with rows: held_out wants data.hold_out")
        if not any(wanted):
            return tree
        assert isinstance(data, dict)
        rows = {key: value for key, value in data.items() if key != "answer"}
        rows["hold_out"] = {**data["hold_out"], "use": "held_out"}
        answer = {"answer": data["answer"]} if "answer" in data else {}
        own = [{**answer, **one, "rows": rows} if held else one for one, held in zip(listed, wanted, strict=True)]
        return {**tree, "evaluate": {**evaluate, "benchmarks": own}}

    @field_validator("arms", mode="before")
    @classmethod
    def _wanted(cls, arms: Any) -> Any:
        """A file that is laid over another takes an arm away with `name: null`."""
        return {k: v for k, v in arms.items() if v is not None} if isinstance(arms, dict) else arms


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = (), more: Sequence[str] = ()) -> Config:
    """The file `path`, with the files `more` and then `key.sub=value` overrides laid over it. Raises UserError."""
    tree = read_yaml(path)
    for file in more:
        lay_over(tree, read_yaml(file))
    for override in overrides:
        key, equals, value = override.partition("=")
        for name in tree.get("arms") or ():  # which may hold an equals sign itself
            if override.startswith(f"arms.{name}="):
                key, value = f"arms.{name}", override.removeprefix(f"arms.{name}=")
        if not equals or not key:
            raise UserError(f"got override {override!r}, want key.sub=value")
        assign(tree, key, parse_yaml(value, f"override {key}"))
    return build(tree, path)


def build(tree: dict[str, Any], source: str | Path) -> Config:
    """Validates a nested dict; `source` is the name used in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise as_user_error(error, source, Config) from None


def with_overrides(config: Config, changes: dict[str, Any], source: str | Path) -> Config:
    """A copy of `config` with dotted keys replaced."""
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        assign(tree, key, value)
    return build(tree, source)


def dump(config: Config) -> str:
    """The resolved configuration as YAML."""
    out = io.StringIO()
    YAML().dump(config.model_dump(mode="json"), out)
    return out.getvalue()
