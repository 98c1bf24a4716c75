"""The configuration: every hyper-parameter of every stage, typed, frozen, and read from YAML.

`load(path, overrides)` is the way in. Unknown keys fail and name the nearest known one; numbers such as
`1e-5` are numbers (YAML 1.2); duplicate keys, aliases, tags and non-finite values are refused. Relative
paths are relative to the working directory. Defaults live here and nowhere else.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML

from dail_jax.errors import UserError
from dail_jax.strict_yaml import assign, explain, included, lay_over, parse_yaml, read_yaml


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


REMOTE = "want a path on this machine: remote storage is not supported"


def is_remote(path: str) -> bool:
    """Whether a path is a URL such as `gs://bucket/run`, of which the file system would make a folder `gs:`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def _local(path: str) -> str:
    if is_remote(path):
        raise ValueError(REMOTE)
    return path


LocalPath = Annotated[str, AfterValidator(_local)]


class Section(BaseModel):
    """A frozen part of the configuration that knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The frozen base model: a Hugging Face folder with config.json, safetensors and a tokenizer."""

    path: LocalPath
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    tokenizer: LocalPath | None = None  # another folder; default: the model's own


class Mesh(Section):
    """Devices per axis; at most one axis may be -1, which takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    @model_validator(mode="after")
    def _axes(self):
        sizes = list(self.model_dump().values())
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError("axis sizes must be positive, and at most one may be -1")
        return self


class Columns(Section):
    """What the dataset calls the fields that we need."""

    problem_id: str = "problem_id"
    problem: str = "problem"
    solution: str = "solution"
    answer: str = "answer"
    waypoints: str = "waypoints"  # text with one a line, or a list; for the extractor `file`
    choices: str | tuple[str, ...] | None = None  # a column with a list of texts, or a column for each


class Rows(Section):
    """A dataset: a .jsonl or .parquet file, `hub:NAME` through the `datasets` extra, or a source of your own.

    A control token in a problem or solution, such as <|im_end|> or </think>, would end a turn or a thought. By default
    it is encoded as the plain text that it is there.
    """

    path: LocalPath
    split: str = "train"
    columns: Columns = Columns()
    limit: Count | None = None
    special_tokens: Literal["text", "keep", "refuse"] = "text"  # keep: encoded as control tokens


class Prompts(Section):
    """Templates of the three roles (files; null = the package's own) and how a solution is cut.

    `opening` is what the assistant's turn starts with, e.g. "<think>\\n" for a thinking model.
    A solution is cut to its first tokens, for every role alike, where it has more than `max_solution_tokens` or where
    the privileged student's prompt would not fit `generate.max_prompt_tokens`.
    """

    student: LocalPath | None = None
    privileged: LocalPath | None = None
    negative: LocalPath | None = None
    expert: LocalPath | None = None  # the reply that SFT imitates; null = the solution as it is
    hint: LocalPath | None = None  # the student's prompt with a hint, for nurl
    opening: str = ""
    max_solution_tokens: Count | None = None  # null = what generate.max_prompt_tokens leaves


class Waypoints(Section):
    """How the negative reference's waypoints are taken from a solution."""

    extractor: str = "math"
    limit: Natural = 0  # keep at most this many (0 = all)


class Sampling(Section):
    """How tokens are drawn. `top_k: 0` and `top_p: 1` switch truncation off; temperature 0 is greedy."""

    temperature: NonNegative = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: Natural = 0
    presence_penalty: Number = 0.0
    max_tokens: Count = 256
    suppress: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return (self.temperature, self.top_p, self.top_k, self.presence_penalty, self.suppress) == (1, 1, 0, 0, ())


class Generate(Section):
    """Mixed policy rollouts (paper, section 3). tau 0: student alone; tau 1: privileged student alone."""

    tau: Fraction = 0.8
    proposals: Count = 1
    samples: Count = 1
    slots: Count = 64
    max_prompt_tokens: Count = 4096
    sampling: Sampling = Sampling()


class Filters(Section):
    """Which traces are trained on; every drop is counted under its reason."""

    correct: bool = False  # drop traces whose boxed answer is wrong (needs an answer)
    finished: bool = False  # drop traces that were cut at max_tokens
    artefacts: tuple[str, ...] = (
        "reference solution",
        "provided solution",
        "given solution",
        "solution provided",
        "solution above",
        "the expert",
        "the hint",
    )
    max_repetition: Fraction = 0.5  # drop when more than this share of 8-grams are repeats
    min_tokens: Count = 1
    keep: Count | Literal["all"] = 1  # traces a problem
    choose: Literal["first", "random"] = "first"  # which of them: in order of samples, or by the run's seed


class Lora(Section):
    """Low-rank adapters on all layers."""

    rank: Count = 32
    alpha: Positive = 32.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = (
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    )

    @model_validator(mode="after")
    def _some(self):
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError("targets must be a non-empty list without repeats")
        return self


class Optimizer(Section):
    """Adam with decoupled weight decay and linear warm-up; `muon` uses Muon on matrices (pretrain only)."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 2e-4
    matrix_learning_rate: Positive = 0.02  # Muon's, for matrices
    warmup_steps: Natural = 5
    schedule: Literal["linear", "constant", "trapezoid"] = "linear"
    decay_fraction: Fraction = 0.3  # of the steps, for `trapezoid`
    weight_decay: NonNegative = 0.01
    b1: BelowOne = 0.9
    b2: BelowOne = 0.999
    clip: Positive = 1.0


class Online(Section):
    """For methods that learn from what the student writes now: a round samples, grades, and makes its updates."""

    problems: Count = 16  # a round
    group: Count = 8  # samples a problem
    clip_ratio: Positive = 0.2  # how far a token's probability ratio may leave 1 and still be pushed on (grpo, nurl)
    kl_weight: NonNegative = 0.01  # of KL(student || frozen base), over the full vocabulary (grpo, nurl)
    hint: Literal["trace", "waypoints"] = "trace"  # nurl: how a trace of `generate` begins, or the waypoints
    hint_tokens: Count = 64  # ... of a trace, and never more than half of it
    slots: Count = 64
    sampling: Sampling = Sampling()


class Train(Section):
    """Training of the LoRA: an `objective`, on `epochs` passes over what it learns from.

    The objectives and what each of them learns from are the table `METHODS` in `dail_jax/train/methods.py`.
    """

    objective: str = "dail"
    gamma: NonNegative = 0.1  # weight of the negative reference (dail, onpolicy)
    kl: Literal["reverse", "forward"] = "reverse"  # direction of the divergences (dail, onpolicy)
    loss: dict[str, Number] = {}  # further settings, which a method declares
    reduce: Literal["token", "sequence"] = "token"  # mean over an update's tokens, or of its sequences' own means
    epochs: Count = 3
    batch_size: Count = 16  # sequences per update
    accumulate: Count = 1  # micro-batches per update
    max_tokens: Count = 2048  # a longer prompt + response is dropped and counted
    bucket: Count = 64  # prompts and responses are padded to multiples of this
    chunk: Count = 1024  # response positions whose logits exist at one time
    remat: Literal["none", "full", "dots"] = "full"
    cache_references: bool = True  # keep the frozen roles' states on disk and reuse them in every epoch
    references_gib: Positive = 64.0  # ... if they take no more than this
    workers: Natural = 0  # Grain worker processes
    save_every: Count = 50
    keep_checkpoints: Count = 2
    max_skipped: Count = 5  # non-finite updates in a row before giving up
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    online: Online = Online()

    @model_validator(mode="after")
    def _divides(self):
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        return self


class Force(Section):
    """The forced answer of a sample that holds no complete one: this text, then at most `max_tokens` more.

    Thoughts that are still open are closed first, so that one text serves models that think and models that do not.
    """

    text: str = "\n\nThe final answer is \\boxed{"
    max_tokens: Count = 100

    @field_validator("text")
    @classmethod
    def _leaves_thoughts_alone(cls, text: str) -> str:
        if "</" in text:
            raise ValueError("want a text without a closing tag: thoughts that are still open are closed before it")
        return text


class Benchmark(Section):
    """One evaluation set, here or in a file of its own: `{from: FILE}`; keys beside `from` replace the file's.

    `answer: choice` with `rows.columns.choices` shows the choices in an order of each question's own and grades the
    letter. The answer column then holds the right choice's text or letter, or its index as a number from 0.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    rows: Rows
    template: LocalPath | None = None  # null = the student's, or with choices the package's own for these
    answer: str = "math"  # a name in dail_jax.evaluate.answers.ANSWERS: math, integer, choice, none, or your own
    ungradable: Literal["refuse", "skip"] = "refuse"  # what to do with rows whose gold answer cannot be read
    pool: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None  # a row over all benchmarks of this pool


class Evaluate(Section):
    """pass@k with n samples per problem, cut at each of `budgets`.

    `budget` names what a budget covers. `all`: every token of a reply. `thoughts`: the thoughts alone, as in the paper;
    a reply whose thoughts end within the budget has `force.max_tokens` more for its answer. A reply without thoughts
    is covered as a whole either way. With `force`, a reply that is left without a complete answer is asked for one.
    """

    benchmarks: tuple[Annotated[Benchmark, BeforeValidator(included)], ...] = ()
    # A PEFT folder to evaluate (with train.objective: none); null = what this run trained
    adapter: LocalPath | None = None
    sampler: str = "engine"  # who draws the samples: a name in dail_jax/stages/samplers.py
    samples: Count = 128
    ks: tuple[Count, ...] = ()  # empty = powers of two up to samples
    budgets: tuple[Count, ...] = ()  # empty = sampling.max_tokens alone
    budget: Literal["thoughts", "all"] = "all"
    slots: Count = 64
    max_prompt_tokens: Count = 4096
    force: Force | None = None
    bootstrap: Count = 2000
    sampling: Sampling = Sampling(temperature=0.6, top_p=0.95, presence_penalty=1.5, max_tokens=4096)

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
    """What `export` writes besides the PEFT adapter."""

    merged: bool = False


class Pretrain(Section):
    """Training all weights of a small model from scratch on rows with `prompt` and `response`."""

    rows: LocalPath
    architecture: dict[str, Any]  # the config.json to train
    steps: Count = 1000
    tokens_per_step: Count = 4096
    bucket: Count = 16
    max_tokens: Count = 256
    log_every: Count = 20
    save_every: Count = 500
    optimizer: Optimizer = Optimizer(name="muon", learning_rate=3e-3, schedule="trapezoid", weight_decay=0.0)


class Log(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    wandb: str | None = None  # the project's name


class Config(Section):
    """Everything. One file configures one experiment; `arms` turns it into several that share traces."""

    run_dir: LocalPath
    seed: Seed = 3407
    model: Model
    mesh: Mesh = Mesh()
    data: Rows | None = None
    prompts: Prompts = Prompts()
    waypoints: Waypoints = Waypoints()
    generate: Generate = Generate()
    traces: LocalPath | None = None  # a traces.jsonl made elsewhere; null = this run's own
    filters: Filters = Filters()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    pretrain: Pretrain | None = None
    log: Log = Log()
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_,=-][A-Za-z0-9_.,=-]*$")], dict[str, Any]] = {}

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
        if not equals or not key:
            raise UserError(f"got override {override!r}, want key.sub=value")
        assign(tree, key, parse_yaml(value, f"override {key}"))
    return build(tree, path)


def build(tree: dict[str, Any], source: str | Path) -> Config:
    """Validates a nested dict; `source` is the name used in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise explain(error, source, Config) from None


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
