"""The configuration: every hyper-parameter of every stage, typed, frozen, and read from YAML.

`load(path, overrides)` is the way in. Unknown keys fail and name the nearest known one; numbers such as
`1e-5` are numbers (YAML 1.2); duplicate keys, aliases, tags and non-finite values are refused. Relative
paths are relative to the working directory. Defaults live here and nowhere else.
"""

from __future__ import annotations

import difflib
import io
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dail_jax.errors import UserError


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("want a finite number")
    return value


Number = Annotated[float, AfterValidator(_finite)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen part of the configuration that knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The frozen base model: a Hugging Face folder with config.json, safetensors and a tokenizer."""

    path: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    tokenizer: str | None = None  # another folder; default: the model's own


class Mesh(Section):
    """Devices per axis; at most one axis may be -1, which takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    @model_validator(mode="after")
    def _axes(self):
        sizes = [self.data, self.fsdp, self.tensor]
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


class Rows(Section):
    """A dataset: a .jsonl or .parquet file, or `hub:NAME` through the `datasets` extra."""

    path: str
    split: str = "train"
    columns: Columns = Columns()
    limit: Count | None = None


class Prompts(Section):
    """Templates of the three roles (files; null = the package's own) and how a solution is cut.

    `opening` is what the assistant's turn starts with, e.g. "<think>\\n" for a thinking model.
    A solution longer than `max_solution_tokens` is cut to its first tokens, for every role alike.
    """

    student: str | None = None
    privileged: str | None = None
    negative: str | None = None
    expert: str | None = None  # the reply that SFT imitates; null = the solution as it is
    opening: str = ""
    max_solution_tokens: Count = 4096


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


class Generate(Section):
    """Mixed policy rollouts (paper, section 3). tau 0: student alone; tau 1: privileged student alone."""

    tau: Fraction = 0.8
    proposals: Count = 1
    samples: Count = 1
    slots: Count = 64
    draft: Natural = 0  # tokens to draft by n-grams where that is faster: same text, log-probabilities to rounding
    max_prompt_tokens: Count = 4096
    sampling: Sampling = Sampling()


class Filters(Section):
    """Which traces are trained on; every drop is counted under its reason."""

    correct: bool = False  # drop traces whose boxed answer is wrong (needs an answer)
    finished: bool = False  # drop traces that were cut at max_tokens
    artefacts: tuple[str, ...] = ("reference solution", "provided solution", "given solution", "the hint")
    max_repetition: Fraction = 1.0  # drop when more than this share of 8-grams are repeats
    min_tokens: Count = 1
    keep: Literal["first", "all"] = "first"  # traces per problem


class Lora(Section):
    """Low-rank adapters on all layers."""

    rank: Count = 32
    alpha: Positive = 32.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = (
        "q", "k", "v", "o", "gate", "up", "down",
    )  # fmt: skip

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
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    clip: Positive = 1.0


class Train(Section):
    """Training of the LoRA. `objective: none` evaluates the untrained model."""

    objective: Literal["dail", "nll", "sft", "none"] = "dail"
    gamma: Annotated[Number, Field(ge=0)] = 0.1
    kl: Literal["reverse", "forward"] = "reverse"
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

    @model_validator(mode="after")
    def _divides(self):
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        if self.objective == "dail" and self.kl == "reverse" and self.gamma >= 1:
            raise ValueError("gamma must be below 1: the objective is unbounded otherwise")
        return self


class Force(Section):
    """The forced answer of a sample that its budget cut: this text, then at most `max_tokens` more."""

    text: str = "\n</think>\n\nThe final answer is \\boxed{"
    max_tokens: Count = 100


class Benchmark(Section):
    """One evaluation set."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    rows: Rows
    template: str | None = None  # null = the student's
    answer: Literal["math", "integer", "choice"] = "math"


class Evaluate(Section):
    """pass@k with n samples a problem, cut at each budget."""

    benchmarks: tuple[Benchmark, ...] = ()
    samples: Count = 128
    ks: tuple[Count, ...] = ()  # empty = powers of two up to samples
    budgets: tuple[Count, ...] = ()  # empty = sampling.max_tokens alone
    slots: Count = 64
    draft: Natural = 0  # tokens to draft by n-grams where that is faster: same text, log-probabilities to rounding
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
        if len({b.name for b in self.benchmarks}) != len(self.benchmarks):
            raise ValueError("benchmark names must differ")
        return self


class Export(Section):
    """What `export` writes besides the PEFT adapter."""

    merged: bool = False


class Pretrain(Section):
    """Training all weights of a small model from scratch on rows with `prompt` and `response`."""

    rows: str
    architecture: dict[str, Any]  # the config.json to train
    steps: Count = 1000
    tokens_per_step: Count = 4096
    bucket: Count = 16
    max_tokens: Count = 256
    log_every: Count = 20
    optimizer: Optimizer = Optimizer(name="muon", learning_rate=3e-3, schedule="trapezoid", weight_decay=0.0)


class Log(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    wandb: str | None = None  # the project's name


class Config(Section):
    """Everything. One file configures one experiment; `arms` turns it into several that share traces."""

    run_dir: str
    seed: Natural = 3407
    model: Model
    mesh: Mesh = Mesh()
    data: Rows | None = None
    prompts: Prompts = Prompts()
    waypoints: Waypoints = Waypoints()
    generate: Generate = Generate()
    traces: str | None = None  # a traces.jsonl made elsewhere; null = this run's own
    filters: Filters = Filters()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    pretrain: Pretrain | None = None
    log: Log = Log()
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], dict[str, Any]] = {}


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in file `path`, with `key.sub=value` overrides applied; raises UserError."""
    tree = read_yaml(path)
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
        raise _explain(error, source) from None


def with_overrides(config: Config, changes: dict[str, Any], source: str | Path) -> Config:
    """A copy of `config` with dotted keys replaced."""
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        assign(tree, key, value)
    return build(tree, source)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises UserError with the line at fault."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", file=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read as UTF-8 text: {error}", file=path) from None
    tree = parse_yaml(text, path)
    if not isinstance(tree, dict):
        kind = "an empty file" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"got {kind}, want a mapping of keys", file=path)
    return tree


def parse_yaml(text: str, source: str | Path) -> Any:
    """A YAML 1.2 document; aliases and tags are refused, since nothing here needs them."""
    yaml = YAML(typ="safe", pure=True)
    try:
        for event in yaml.parse(io.StringIO(text)):
            line = event.start_mark.line + 1
            if type(event).__name__ == "AliasEvent":
                raise UserError("got a YAML alias, want plain values", file=source, row=line)
            if getattr(event, "tag", None):
                raise UserError(f"got the YAML tag {event.tag!s}, want plain values", file=source, row=line)
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = (error.problem or str(error)).split("\n")[0]
        raise UserError(f"not valid YAML: {problem}", file=source, row=mark.line + 1 if mark else None) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not valid YAML: {str(error).splitlines()[0]}", file=source) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML."""
    out = io.StringIO()
    yaml = YAML()
    yaml.dump(config.model_dump(mode="json"), out)
    return out.getvalue()


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in a nested dict, in place; list elements by index, as in `benchmarks.0.name`."""
    node: Any = tree
    parts = key.split(".")
    for part in parts[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise UserError(f"got override {key!r}, but {part!r} is not inside a section")
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    if isinstance(node, list) and parts[-1].isdigit() and int(parts[-1]) < len(node):
        node[int(parts[-1])] = value
    elif isinstance(node, dict):
        node[parts[-1]] = value
    else:
        raise UserError(f"got override {key!r}, but its parent is not a section")


def _explain(error: ValidationError, source: str | Path) -> UserError:
    """The first complaint of pydantic as one line of ours."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1, 0.0)
        hint = f"did you mean {near[0]!r}?" if near else "no keys are known here"
        return UserError(f"unknown key; {hint}", file=source, field=field)
    if first["type"] == "missing":
        return UserError("missing, and it has no default", file=source, field=field)
    want = first["msg"].removeprefix("Value error, ")
    want = want[0].lower() + want[1:]
    got = repr(first["input"])
    return UserError(f"got {got if len(got) <= 80 else got[:77] + '...'}, {want}", file=source, field=field or None)


def _keys_at(loc: tuple[str | int, ...]) -> list[str]:
    """The keys known at a place in the tree of sections."""
    model: type[BaseModel] = Config
    for part in loc:
        if not isinstance(part, str) or part not in model.model_fields:
            continue
        section = _section_in(model.model_fields[part].annotation)
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The Section inside an annotation such as `tuple[Benchmark, ...]` or `Rows | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, dict, Union) or get_args(annotation):
        return next((s for a in get_args(annotation) if (s := _section_in(a))), None)
    return None
