"""The configuration: defaults, files, overrides, and refusals that say what would be right."""

import re
import shlex
from pathlib import Path

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import CommandParser
from plt_jax.config import SCHEMES, LoopConfig, ModelConfig, RunConfig
from plt_jax.config.data import DataConfig
from plt_jax.config.types import Section
from plt_jax.config.yaml_file import dump_config, merge
from plt_jax.errors import InputError
from plt_jax.runs.configuration import load_config

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """Loads YAML text, with overrides."""

    def load(text: str, overrides=None) -> RunConfig:
        path = tmp_path / "name.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load


def leaves(values, prefix=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_hold_only_what_differs(path):
    config = load_config(path)
    assert config.run_dir == f"runs/{path.stem}"
    for name, value in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))):
        default, resolved = RunConfig().model_dump(), config.model_dump()
        for part in name:
            default, resolved = default[part], resolved[part]
        assert default != resolved, f"{'.'.join(name)} = {value} is the default"


def test_there_are_shipped_configs():
    assert "tiny" in {path.stem for path in CONFIGS}


def test_shipped_configs_name_the_data_that_they_are_made_for():
    """Shapes, and the start of a continued run, leave it to whoever trains them."""
    named = {path.stem: load_config(path).data.text for path in CONFIGS}
    assert {name: text for name, text in named.items() if text != "no data"} == {
        "ablation": "corpora/speeches_and_code",
        "ablation_30m": "corpora/speeches_and_code",
        "ablation_addition": "the synthetic task addition",
        "ablation_p_hop": "the synthetic task p_hop",
        "ablation_permutations": "the synthetic task permutations",
        "tiny": "sotu",
        "tiny_moe": "sotu",
    }


def commands_of(document: str) -> list[list[str]]:
    """The words of each training command in a document's blocks of code."""
    text = (REPOSITORY / document).read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        shlex.split(found[1], comments=True)
        for found in re.finditer(r"python (?:train\.py|-m plt_jax\.train) +(configs/[^`\n]+)", text)
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_training_commands_name_data(document, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for words in commands_of(document):
        if "--start_from" in words:  # the run that it starts from is not there
            place = words.index("--start_from")
            del words[place : place + 2]
        assert parse_run_config(CommandParser(), words).data.is_named, words


def test_there_are_documented_training_commands():
    assert sum(len(commands_of(document)) for document in DOCUMENTS) > 5


def test_a_source_that_is_not_read_is_not_kept(load):
    """An earlier version kept it, and its runs go on."""
    for section in ("sources: [{path: a}]", "synthetic: {task: dyck}"):
        config = load(f"data: {{source: sotu, {section}}}")
        assert config == load(f"data: {{{section}}}")
        assert config.data.source is None and config.data.is_named
    assert load("data: {source: sotu, synthetic: {task: none}, sources: []}").data.text == "sotu"
    over = {"data": {"sources": [{"path": "a"}]}}
    assert load("data: {source: sotu}", over).data.text == "a"


def test_defaults_that_depend_on_other_fields(load):
    assert LoopConfig().count == 2
    assert LoopConfig(scheme="no_loop").count == 1
    assert load("model: {loop: {scheme: no_loop}}").model.loop.count == 1
    assert {LoopConfig(scheme=name).count for name in SCHEMES if name != "no_loop"} == {2}
    assert ModelConfig(width=96, heads=4, kv_heads=2).head_width == 24
    assert ModelConfig(width=96, heads=4, kv_heads=2, head_width=10).head_width == 10
    assert load("model: {max_length: 128}").sequence_length == 128
    assert load("model: {max_length: 128}\ndata: {sequence_length: 32}").sequence_length == 32


def test_an_empty_file_is_all_defaults(load):
    expected = RunConfig(run_dir="runs/name")
    assert load("") == expected
    assert load("# nothing but a comment\n") == expected


REFUSED = {
    "model: {wdth: 3}": "unknown field model.wdth; did you mean width?",
    "model: {loop: {windw: 3}}": "unknown field model.loop.windw; did you mean window?",
    "trainin: {steps: 3}": "unknown field trainin; did you mean training?",
    "checkpoint: {zzz: 3}": "unknown field checkpoint.zzz; known here: keep, keep_best",
    "training: {steps: many}": "training.steps = 'many': input should be a valid integer",
    "training: {steps: 1.5}": "training.steps = 1.5: input should be a valid integer",
    "training: {steps: [1]}": "training.steps = [1]: input should be a valid integer",
    "training: {steps: 0}": "training.steps = 0: input should be greater than 0",
    "model: {heads: abc}": "model.heads = 'abc': input should be a valid integer",
    "model: {heads: 6}": "heads 6 is not divisible by kv_heads 4; "
    "kv_heads must be one of [1, 2, 3, 6]",
    "model: {width: 100}": "width 100 is not divisible by heads 12; change one, or set head_width",
    "model: {head_width: 7}": "head_width 7 is odd; RoPE needs an even number (by default it is "
    "width / heads)",
    "model: {width: 84}": "head_width 7 is odd",
    "model: {attention: flash}": "model.attention = 'flash': input should be 'auto', 'xla', "
    "'cudnn' or 'splash'",
    "model: {attention: cudnn}": "attention is cudnn, but dtype is float32; set dtype to bfloat16, "
    "or attention to auto",
    "model: {attention: cudnn, dtype: bfloat16, head_width: 100}": "attention is cudnn, but "
    "head_width is 100; set head_width to a multiple of 8 up to 128, or attention to auto",
    "model: {attention: cudnn, dtype: bfloat16, head_width: 256}": "head_width is 256; set head_wi",
    "model: {loop: {window: 0}}": "model.loop.window = 0: input should be greater than 0",
    "model: {loop: {count: 0}}": "model.loop.count = 0: input should be greater than 0",
    "model: {loop: {scheme: no_loop, count: 2}}": "count is 2, but the scheme no_loop runs the "
    "stack once; set count to 1 or choose a looped scheme",
    "model: {loop: {scheme: ptl}}": "model.loop.scheme = 'ptl': input should be 'no_loop', "
    "'vanilla_loop', 'clp', 'clp_kv_share', 'plt' or 'loop_kv_share_window'",
    "training: {accumulate: 3}": "batch_size 32 is not divisible by accumulate 3; accumulate must "
    "be one of [1, 2, 4, 8, 16, 32]",
    "data: {sequence_length: 4096}": "data.sequence_length 4096 is above model.max_length 2048; "
    "lower the one or raise the other",
    "optimizer: {schedule: wsd, warmup_fraction: 0.9}": "warmup_fraction 0.9 and decay_fraction "
    "0.2 add up to more than 1; lower one",
    "mesh: {tensor: 0}": "tensor is 0; use a positive size, or -1 for the remaining devices",
    "mesh: {fsdp: -2}": "mesh.fsdp = -2: input should be greater than or equal to -1",
    "mesh: {fsdp: -1}": "only one axis may be -1, got {'data': -1, 'fsdp': -1, 'expert': 1, "
    "'context': 1, 'tensor': 1}",
    "optimizer: {epsilon: 1.0e-300}": "optimizer.epsilon = 1e-300: input should be greater than or",
    "optimizer: {epsilon: 1.0e-30}": "optimizer.epsilon = 1e-30: input should be greater than or",
    "model: {norm_epsilon: 1.0e-30}": "model.norm_epsilon = 1e-30: input should be greater than or",
    "optimizer: {weight_decay: 1.0e+300}": "optimizer.weight_decay = 1e+300: input should be less",
    "model: {loop: {hidden_scale: -1.0e+39}}": "model.loop.hidden_scale = -1e+39: input should be",
    "model: {loop: {window: 2147483648}}": "model.loop.window = 2147483648: input should be less",
    "guard: {window: 9223372036854775808}": "guard.window = 9223372036854775808: input should be",
    "mesh: {data: 2147483648}": "mesh.data = 2147483648: input should be less than 2147483648",
    "model: {width: .inf}": "model.width = inf: input should be a finite number",
    "model: {heads: .inf}": "model.heads = inf: input should be a finite number",
    "data: {sources: [{path: a, wieght: 1}]}": "unknown field data.sources.0.wieght; did you mean "
    "weight?",
    "run_dir: s3://bucket/run": "run_dir: s3://bucket/run: s3:// is not supported; give a path of",
    "data: {cache_dir: gs://bucket/c}": "data.cache_dir: gs://bucket/c is not a path of a file "
    "system; mount",
    r'run_dir: "a\0b"': "run_dir: 'a\\x00b' holds a NUL character, which no path may hold",
    f"data: {{cache_dir: a/{'x' * 256}}}": "data.cache_dir: the name xxxxxxxxxxxxxxxxxxxx... in it "
    "has more than 255 bytes; shorten it",
    "optimizer: {learning_rate: .nan}": "optimizer.learning_rate = nan: input should be a finite",
    "optimizer: {learning_rate: .inf}": "optimizer.learning_rate = inf: input should be a finite",
    "model: {loop: {hidden_scale: -.inf}}": "model.loop.hidden_scale = -inf: input should be a fin",
    "model: 5": "model = 5: input should be a valid dictionary",
    "model: {loop: plt}": "model.loop = 'plt': input should be a valid dictionary",
    "model: {1: 2}": "model.1 = 1: keys should be strings",
    "data: {validation_fraction: 1.0}": "data.validation_fraction = 1.0: input should be less",
    "seed: -1": "seed = -1: input should be greater than or equal to 0",
    "model: {moe: {experts: 1}}": "experts_per_token 2 is above experts 1; lower the one or raise",
    "model: {layers: 2, moe: {experts: 4, dense_layers: 2}}": "moe.dense_layers 2 leaves none of "
    "the 2 layers to the experts; lower it",
    "model: {moe: {dense_layers: 1}}": "dense_layers is 1 in a model without experts",
    "model: {moe: {bias_update_rate: 0.1}}": "bias_update_rate is 0.1 in a model without experts",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_refusal_names_the_field_the_value_and_what_would_be_right(load, text):
    with pytest.raises(InputError) as refusal:
        load(text)
    message = str(refusal.value)
    assert REFUSED[text] in message
    assert "name.yaml" in message
    assert "\n" not in message


def test_where_to_start_from_is_named_if_it_cannot_be(load):
    for path, reason in (
        ("~nobody-is-called-so/x", "begins with the home folder of an unknown user"),
        (
            r'"\0"',
            "does not exist; give a run directory",
        ),
    ):
        with pytest.raises(InputError, match=rf"^start_from: .*{reason}"):
            load(f"start_from: {path}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "is not valid YAML: "),
        ("- a", "must hold a mapping of sections, not a list"),
        ("word", "must hold a mapping of sections, not a str"),
    ],
)
def test_what_is_no_mapping_is_refused_in_one_line(load, text, expected):
    with pytest.raises(InputError, match=f"name.yaml {expected}") as refusal:
        load(text)
    assert "\n" not in str(refusal.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the config .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"cannot read the config .*: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("data: {source: caf\xe9}".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml is not valid YAML: 'utf-8' codec"):
        load_config(tmp_path / "latin.yaml")


def test_several_mistakes_are_all_named(load):
    with pytest.raises(InputError) as refusal:
        load("training: {stps: 3}\nseed: x")
    assert "unknown field training.stps; did you mean steps?" in str(refusal.value)
    assert "seed = 'x': input should be a valid integer" in str(refusal.value)


@pytest.mark.parametrize("text", ["run_dir:", "run_dir: null"])
def test_an_empty_run_dir_is_the_default(load, text):
    assert load(text).run_dir == "runs/name"


def test_numbers_with_exponents_are_numbers(load):
    # YAML 1.1 reads 3e-3, without a point, as text.
    assert load("optimizer: {learning_rate: 3e-3}").optimizer.learning_rate == 3e-3
    assert load("optimizer: {learning_rate: 3.0e-3}").optimizer.learning_rate == 3e-3


def test_overrides_beat_the_file_and_leave_the_rest(load):
    text = "training: {steps: 5, batch_size: 8}\nmodel: {loop: {window: 7}}\nrun_dir: here"
    config = load(text, {"training": {"steps": 6}, "model": {"loop": {"count": 3}}, "seed": 4})
    assert (config.training.steps, config.training.batch_size) == (6, 8)
    assert (config.model.loop.count, config.model.loop.window) == (3, 7)
    assert (config.seed, config.run_dir) == (4, "here")
    assert load(text, {"run_dir": "there"}).run_dir == "there"


def test_an_override_can_repair_the_file(load):
    assert load("training: {steps: many}", {"training": {"steps": 3}}).training.steps == 3


def test_overrides_are_checked_with_the_file_as_one(load):
    with pytest.raises(InputError, match="batch_size 6 is not divisible by accumulate 4"):
        load("training: {accumulate: 4}", {"training": {"batch_size": 6}})


def test_merge_does_not_change_its_arguments():
    base, top = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}
    assert merge(base, top) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert (base, top) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4})


def test_configurations_are_frozen_and_hashable():
    config = RunConfig()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.model.loop.count = 3
    assert hash(config) == hash(RunConfig())
    assert len({ModelConfig(), ModelConfig(), ModelConfig(layers=3)}) == 2


def sections(section=RunConfig):
    yield section
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation)


def test_every_field_and_section_says_what_it_means():
    for section in sections():
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


RUNS = st.fixed_dictionaries(
    {
        "run_dir": st.text("abc /:#'\"-é", min_size=1).filter(lambda name: "://" not in name),
        "seed": st.integers(0, 2**32 - 1),
        "model": st.fixed_dictionaries(
            {
                "width": st.sampled_from([24, 48, 96]),
                "kv_heads": st.sampled_from([1, 2, 12]),
                "head_width": st.sampled_from([None, 2, 64]),
                "tied_embeddings": st.booleans(),
                "norm_epsilon": st.floats(1e-12, 1e-2),
                "loop": st.one_of(
                    st.just({"scheme": "no_loop"}),
                    st.fixed_dictionaries(
                        {
                            "scheme": st.sampled_from([n for n in SCHEMES if n != "no_loop"]),
                            "count": st.integers(1, 5),
                            "hidden_scale": st.floats(-1e38, 1e38),
                        }
                    ),
                ),
            }
        ),
        "data": st.fixed_dictionaries(
            {
                "source": st.text(
                    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60
                ),
                "sequence_length": st.one_of(st.none(), st.integers(1, 2048)),
            }
        ),
        "optimizer": st.fixed_dictionaries(
            {"learning_rate": st.floats(1e-30, 1e30), "clip_norm": st.one_of(st.none(), st.just(2))}
        ),
    }
)


@settings(max_examples=60)
@given(values=RUNS)
def test_what_is_written_is_read_back_the_same(tmp_path_factory, values):
    config = RunConfig.model_validate(values)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert set(yaml.safe_load(dump_config(config))) == set(RunConfig.model_fields)


def test_what_is_trained_on_has_a_name():
    assert DataConfig().text == "no data" and not DataConfig().is_named
    assert DataConfig(source="sotu").text == "sotu" and DataConfig(source="sotu").is_named
    sources = [{"path": "corpora/web"}, {"path": "corpora/code"}]
    assert DataConfig(sources=sources).text == "corpora/web, corpora/code"


ALIASES = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "stands for more than 100,000 values"),
        ("a: &a [*a]", "not valid YAML|stands for|unknown field"),
        ("seed: " + "[" * 5000, "not valid YAML"),
        ("seed: 2024-99-99", "not valid YAML"),
        ("seed: !!int abc", "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("seed: !!timestamp x", "not valid YAML"),
        ("seed: !!float x", "not valid YAML"),
        ("? {a: b}\n: c", "not valid YAML"),
        ("seed: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("seed: " + "x" * 2**20, "is larger than such a file may be"),
        ("seed: \x00", "not valid YAML"),
        ("seed: '" + "x" * 10_000 + "'", "seed = "),
    ],
    ids=lambda text: text[:30],
)
def test_hostile_yaml_is_one_short_line(load, text, message):
    with pytest.raises(InputError, match=message) as raised:
        load(text)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 3000
