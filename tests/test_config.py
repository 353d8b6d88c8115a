"""Reading recipes: what is accepted, what is refused, and what the refusal says."""

import dataclasses
import math
import re
import subprocess
import sys
import tomllib

import pytest

from frugal_rl import config
from frugal_rl.config import Recipe, list_recipes, load_recipe, parse_bytes, read_recipe, toml_value
from frugal_rl.errors import InputError

SMALL = """
[model]
name = "tiny"
[data]
source = "rows.jsonl"
[reward]
kind = "last"
[rollout]
prompts = 4
samples = 2
max_tokens = 8
[learner]
lr = 0.5
[train]
steps = 3
"""


def refusal(*overrides, text=SMALL):
    with pytest.raises(InputError) as caught:
        read_recipe(text, overrides, where="mine.toml")
    return str(caught.value)


# What is accepted


def test_a_recipe_has_the_documented_defaults():
    recipe = read_recipe(SMALL)
    assert recipe.model == config.Model("tiny", weights="bf16", reference="base")
    assert recipe.data == config.Data(
        "rows.jsonl",
        prompt="prompt",
        answer="answer",
        answer_after=None,
        heldout=500,
        system=None,
        suffix=None,
        format="chat",
        max_prompt_tokens=512,
    )
    assert recipe.reward == config.Reward("last", timeout_s=5.0, on_timeout=0.0, on_error=0.0)
    assert recipe.rollout == config.Rollout(4, 2, 8, temperature=1.0, generator="engine")
    assert recipe.loss == config.Loss(
        "grpo", kl=0.0, clip_low=None, clip_high=None, correction="auto", uncorrected=False, max_gap=None
    )
    assert recipe.learner == config.Learner(0.5, kind="sgd", clip=1.0, minibatches=1, epochs=1)
    assert recipe.train == config.Train(3, seed=0, eval_every=None)
    assert recipe.memory == config.Memory(budget=None)
    assert recipe.memory.budget_bytes is None


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("learner.lr=1", "learner", "lr", 1.0),
        ("learner.lr = 1e-3", "learner", "lr", 0.001),
        ("data.source=gsm8k/train.jsonl", "data", "source", "gsm8k/train.jsonl"),
        ('data.source="7.jsonl"', "data", "source", "7.jsonl"),
        ("data.answer_after=####", "data", "answer_after", "####"),
        ("data.suffix=a = b", "data", "suffix", "a = b"),
        ("data.suffix=", "data", "suffix", ""),
        ("data.suffix='x'\ntrain.seed = 3", "data", "suffix", "'x'\ntrain.seed = 3"),
        ("data.heldout=test.jsonl", "data", "heldout", "test.jsonl"),
        ("data.heldout=20", "data", "heldout", 20),
        ("reward.on_error=-1", "reward", "on_error", -1.0),
        ("train.seed=9223372036854775807", "train", "seed", 2**63 - 1),
        ("memory.budget=24GiB", "memory", "budget", "24GiB"),
        ("loss.algorithm=reinforce++", "loss", "algorithm", "reinforce++"),
        ("loss.clip_low=1", "loss", "clip_low", 1.0),
        ("train.eval_every=10", "train", "eval_every", 10),
        ("loss.correction=icepop", "loss", "correction", "icepop"),
        ("loss.max_gap=1", "loss", "max_gap", 1.0),
        ("rollout.top_k=40", "rollout", "top_k", 40),
        ("rollout.top_p=1", "rollout", "top_p", 1.0),
        ("rollout.stop=</answer>", "rollout", "stop", "</answer>"),
        ('rollout.stop=["</answer>", "Q:"]', "rollout", "stop", ("</answer>", "Q:")),
    ],
)
def test_an_override_is_toml_or_else_a_bare_text(override, section, key, value):
    got = getattr(getattr(read_recipe(SMALL, [override]), section), key)
    assert got == value
    assert type(got) is type(value)


def test_the_last_of_two_overrides_of_a_key_stands():
    assert read_recipe(SMALL, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_a_later_override_repairs_what_the_file_has_wrong():
    assert read_recipe(SMALL.replace("0.5", '"x"'), ["learner.lr=0.5"]).learner.lr == 0.5


# The round trip

HOSTILE = 'a"b\\c\td\ne\x00\x1f\x7f\u00e9\U0001f600 #[x]\u2028'


def test_the_text_of_a_recipe_reads_back_as_the_same_recipe():
    recipe = read_recipe(SMALL)
    full = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, system=HOSTILE, suffix=HOSTILE, answer_after="####"),
        rollout=dataclasses.replace(recipe.rollout, top_k=3, min_p=0.1, stop=("a", HOSTILE)),
        loss=config.Loss(
            "dapo", kl=1e-17, clip_low=0.1, clip_high=3e22, correction="off", uncorrected=True, max_gap=0.1
        ),
        learner=config.Learner(5e-324, clip=1.7976931348623157e308),
        train=config.Train(1, seed=2**63 - 1, eval_every=1),
        memory=config.Memory("1.5GiB"),
    )
    for one in (recipe, full):
        assert read_recipe(one.to_toml()) == one
        assert read_recipe(one.to_toml()).to_toml() == one.to_toml()


def test_the_text_of_a_recipe_holds_every_key_that_has_a_value():
    tree = tomllib.loads(read_recipe(SMALL).to_toml())
    assert list(tree) == [field.name for field in dataclasses.fields(Recipe)]
    assert tree["train"] == {"steps": 3, "seed": 0}  # no eval_every
    assert tree["memory"] == {}
    assert tree["learner"] == {"lr": 0.5, "kind": "sgd", "clip": 1.0, "minibatches": 1, "epochs": 1}


def test_the_order_of_keys_in_the_file_changes_nothing():
    blocks = SMALL.strip().split("\n[")
    shuffled = "[" + "\n[".join(reversed([blocks[0][1:], *blocks[1:]]))
    assert read_recipe(shuffled).to_toml() == read_recipe(SMALL).to_toml()


@pytest.mark.parametrize("text", ["", "7", "true", "1979-05-27", "[1]", "a=b", "#x", "'", HOSTILE])
def test_a_written_toml_value_is_a_safe_override(text):
    assert read_recipe(SMALL, [f"data.suffix={toml_value(text)}"]).data.suffix == text


def test_recipes_are_frozen_and_can_be_hashed():
    recipe = read_recipe(SMALL)
    assert len({recipe, read_recipe(SMALL)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.train.steps = 4


# What is refused


def test_an_unknown_section_is_refused_with_the_nearest_name():
    message = refusal(text=SMALL + "[modle]\n")
    assert message.startswith('mine.toml: there is no section "modle"; the nearest is "model"')
    assert "expected one of model, data, reward, rollout, loss, learner, train, memory" in message


def test_an_unknown_key_is_refused_with_the_nearest_name_and_the_known_ones():
    message = refusal(text=SMALL.replace("max_tokens", "max_token"))
    assert message.startswith('mine.toml: [rollout] has no key "max_token"')
    assert 'the nearest is "max_tokens"' in message
    assert "prompts, samples, max_tokens, temperature, top_k" in message


def test_a_key_in_the_wrong_section_is_refused_with_the_right_one():
    assert "did you mean learner.lr?" in refusal("train.lr=0.1")
    assert "did you mean learner.lr?" in refusal("lr=0.1")
    assert "did you mean learner.lr?" in refusal(text="lr = 0.1\n" + SMALL)


@pytest.mark.parametrize("section", ["model", "data", "reward", "rollout", "learner", "train"])
def test_a_missing_section_is_refused_by_its_first_missing_key(section):
    head, _, tail = SMALL.partition(f"[{section}]\n")
    message = refusal(text=head + ("[" + tail.partition("[")[2] if "[" in tail else ""))
    assert message.startswith(f"mine.toml: [{section}] ")
    assert "is missing: expected " in message
    assert f"--set {section}." in message


def test_a_value_where_a_section_belongs_is_refused():
    assert "model is a section, write [model]" in refusal(text="model = 3\n")


@pytest.mark.parametrize(
    ("override", "got", "expected"),
    [
        ("rollout.prompts=true", "true", "an integer at least 1"),
        ("rollout.prompts=4.0", "4.0", "an integer at least 1"),
        ("rollout.prompts=0", "0", "an integer at least 1"),
        ("rollout.prompts='4'", '"4"', "an integer at least 1"),
        ("rollout.temperature=0", "0", "a finite number above 0"),
        ("learner.lr=true", "true", "a finite number above 0"),
        ("learner.lr=false", "false", "a finite number above 0"),
        ("learner.lr=0.0", "0.0", "a finite number above 0"),
        ("learner.lr=nan", "nan", "a finite number above 0"),
        ("learner.lr=inf", "inf", "a finite number above 0"),
        ("learner.lr=fast", '"fast"', "a finite number above 0"),
        (f"learner.lr={10**400}", "1000", "a finite number above 0"),
        ("learner.clip=-1", "-1", "a finite number above 0"),
        ("reward.on_error=-inf", "-inf", "a finite number"),
        ("loss.kl=-0.1", "-0.1", "a finite number at least 0"),
        ("loss.clip_low=1.5", "1.5", "a finite number above 0 and at most 1"),
        ("train.seed=-1", "-1", "an integer at least 0"),
        ("train.seed=9223372036854775808", "9223372036854775808", "at most 9223372036854775807"),
        ("train.eval_every=0", "0", "an integer at least 1"),
        ("rollout.min_p=0", "0", "a finite number above 0 and at most 1"),
        ("rollout.stop=[]", "[]", "a text that is not empty or a list of such"),
        ('rollout.stop=["a", ""]', "['a', '']", "a text that is not empty or a list of such"),
        ("model.name=", '""', "a text that is not empty"),
        ("model.name=7", "7", "a text that is not empty"),
        ("data.suffix=7", "7", "a text"),
        ("data.heldout=0", "0", "an integer at least 1 or a text that is not empty"),
        ("data.heldout=[1]", "[1]", "an integer at least 1 or a text"),
        ("data.format=chatt", '"chatt"; the nearest is "chat"', 'one of "chat", "plain"'),
        ("reward.kind=", '""', "a text that is not empty"),
        ("model.weights=int4", '"int4"; the nearest is "int8"', 'one of "bf16", "int8"'),
        ("loss.correction=sparse_rl", '"sparse_rl"; the nearest is "sparse-rl"', '"seq-mis", "geo-rs"'),
        ("loss.uncorrected=1", "1", "true or false"),
        ("loss.max_gap=0", "0", "a finite number above 0"),
        ("loss.algorithm=ppo", '"ppo"', '"grpo", "dr_grpo", "dapo", "rloo", "reinforce++"'),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_got_and_what_was_expected(override, got, expected):
    message = refusal(override)
    assert message.startswith(f"--set {override}: [{override.partition('.')[0]}] ")
    assert f"got {got}" in message
    assert f"expected {expected}" in message or expected in message.partition("expected ")[2]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("maths", "unknown reward 'maths', expected one of math, exact, .* did you mean 'math'"),
        ("math + maths", "unknown reward 'maths'"),
        ("math + math", "'math' twice"),
        ("math(3)", "math takes 0 arguments, got 1"),
        ("tags", "tags takes 1 to 20 arguments, got 0"),
        ("0 * math", "a weight is above 0"),
        ("1.2.3 * math", "not a weight"),
        ("* math", "not understood"),
        ("nowhere.py:judge", "there is no file nowhere.py"),
    ],
)
def test_a_reward_that_is_not_there_is_refused_before_anything_is_loaded(kind, why):
    message = refusal(f"reward.kind={kind}")
    assert "[reward] kind: " in message
    assert re.search(why, message)


@pytest.mark.parametrize("override", ["", "=", "lr", "learner.lr", "learner=0.1", ".lr=1", "a.=1"])
def test_an_override_that_is_no_assignment_is_refused(override):
    assert refusal(override).startswith(f"--set {override}: ")


def test_an_override_that_is_not_utf8_is_refused():
    assert "not valid UTF-8" in refusal("data.suffix=\udcff")


def test_a_value_of_the_file_is_blamed_on_the_file_and_an_overriding_one_on_the_override():
    assert refusal(text=SMALL.replace("0.5", "-1")).startswith("mine.toml: [learner] lr: got -1")
    assert refusal("learner.lr=-1").startswith("--set learner.lr=-1: [learner] lr: got -1")


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo"])
def test_a_group_of_one_is_refused_where_a_group_is_compared(algorithm):
    message = refusal("rollout.samples=1", f"loss.algorithm={algorithm}")
    assert message.startswith("mine.toml --set rollout.samples=1 --set loss.algorithm=")
    assert "expected samples of at least 2" in message


def test_a_group_of_one_is_enough_where_the_batch_is_compared_but_not_a_batch_of_one():
    overrides = ["loss.algorithm=reinforce++", "rollout.samples=1"]
    assert read_recipe(SMALL, overrides).rollout.samples == 1
    assert "expected prompts or samples of at least 2" in refusal(*overrides, "rollout.prompts=1")


@pytest.mark.parametrize("key", ["clip_low", "clip_high"])
def test_a_clip_is_refused_where_nothing_is_clipped(key):
    assert "which clips nothing" in refusal("loss.algorithm=rloo", f"loss.{key}=0.2")
    assert getattr(read_recipe(SMALL, [f"loss.{key}=0.2"]).loss, key) == 0.2


def compressed(*overrides):
    return read_recipe(SMALL, ["rollout.kv_budget=48", *overrides])


def test_the_correction_is_on_by_default_where_the_sampler_is_not_the_learner():
    dense = read_recipe(SMALL)
    assert config.sampler_is_learner(dense)
    assert config.correction_name(dense) == "off"
    assert config.correction_name(read_recipe(SMALL, ["model.weights=int8"])) == "off"
    assert not config.sampler_is_learner(compressed())
    assert config.correction_name(compressed()) == "sparse-rl"
    assert config.correction_name(compressed("rollout.eviction=none")) == "off"
    assert config.correction_name(read_recipe(SMALL, ["model.weights=host"])) == "tis"
    for recipe in (read_recipe(SMALL, ["loss.correction=tis"]), compressed("loss.correction=tis")):
        assert config.correction_name(recipe) == "tis"


def test_training_uncorrected_on_a_compressed_cache_has_to_be_asked_for():
    read_recipe(SMALL, ["loss.correction=off"])
    allowed = compressed("loss.correction=off", "loss.uncorrected=true")
    assert config.correction_name(allowed) == "off"
    with pytest.raises(InputError, match=r"kv_budget = 48.*uncorrected = true"):
        compressed("loss.correction=off")
    with pytest.raises(InputError, match=r'weights = "host".*uncorrected = true'):
        read_recipe(SMALL, ["model.weights=host", "loss.correction=off"])


@pytest.mark.parametrize("word", ["auto", "tis"])
def test_uncorrected_is_refused_beside_a_correction(word):
    assert 'allows "off" and nothing else' in refusal("loss.uncorrected=true", f"loss.correction={word}")


def test_a_table_of_switches_is_read_written_and_typed():
    recipe = read_recipe(SMALL, ['data.template={enable_thinking=false, "a b"=1.5, effort="low"}'])
    assert recipe.data.template == {"enable_thinking": False, "a b": 1.5, "effort": "low"}
    assert read_recipe(recipe.to_toml()) == recipe
    for bad in ("data.template={}", "data.template=x", "data.template={a=[1]}", "data.template=[1]"):
        assert "expected a table of such as {name = value}, each value true or false" in refusal(bad)
    assert 'template with format = "plain"' in refusal("data.format=plain", "data.template={a=1}")


def test_limits_of_difficulty_need_samples_and_each_other():
    assert "without solve_samples" in refusal("data.solve_above=0.1")
    assert "no share is between them" in refusal(
        "data.solve_samples=8", "data.solve_above=0.5", "data.solve_below=0.5"
    )
    assert "expected a finite number at least 0 and below 1" in refusal("data.solve_above=1.0")
    data = read_recipe(SMALL, ["data.solve_samples=8"]).data
    assert (data.solve_above, data.solve_below) == (0.0, 1.0)


def test_masking_truncated_responses_is_refused_beside_a_kl():
    read_recipe(SMALL, ["rollout.truncated=mask"])
    assert 'truncated = "mask" with [loss] kl = 0.1' in refusal("rollout.truncated=mask", "loss.kl=0.1")


@pytest.mark.parametrize("source", ["rows.jsonl", "rows.parquet", "hub:a/b", "hub:./folder:test"])
def test_rows_of_every_kind_have_fields_and_may_be_held_out(source):
    data = read_recipe(SMALL, [f"data.source={source}", "data.prompt=q", f"data.heldout={source}"]).data
    assert (data.source, data.prompt, data.heldout) == (source, "q", source)


def test_a_system_message_is_refused_where_there_is_no_chat():
    assert 'say format = "chat"' in refusal("data.format=plain", "data.system=x")


def test_a_heldout_text_that_is_no_path_is_refused():
    assert "expected a number of problems such as 500" in refusal("data.heldout=some")


@pytest.mark.parametrize(
    "override",
    ["data.prompt=q", "data.answer=a", "data.answer_after=x", "data.heldout=test.jsonl"],
)
def test_a_field_mapping_is_refused_for_a_builtin_task(override):
    key = override.partition("=")[0].removeprefix("data.")
    message = refusal("data.source=last-digit", override)
    assert f'[data] {key} with source = "last-digit"' in message


def test_a_bad_budget_is_refused_by_its_key():
    assert "[memory] budget: " in refusal("memory.budget=24GB")


@pytest.mark.parametrize("text", ["[model", "a = \n", "[model]\n[model]\n", "x = " + "[" * 5000])
def test_text_that_is_not_toml_is_refused(text):
    assert refusal(text=text).startswith("mine.toml is not valid TOML: ")


# Sizes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("24GiB", 24 * 2**30),
        ("24 GiB", 24 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("0.5MiB", 2**19),
    ],
)
def test_sizes_are_powers_of_two(text, size_bytes):
    assert parse_bytes(text) == size_bytes
    assert read_recipe(SMALL, [f"memory.budget={text}"]).memory.budget_bytes == size_bytes


@pytest.mark.parametrize(
    "text", ["", "24", "GiB", "-1GiB", "24gib", "24 G", "1e3GiB", "nanGiB", "24GiB ", "\u0663GiB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="expected such as 24GiB or 512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0GiB", "0.0000001MiB"])
def test_no_memory_at_all_is_refused(text):
    with pytest.raises(InputError, match="no memory at all"):
        parse_bytes(text)


def test_powers_of_ten_are_refused_with_the_unit_to_write():
    with pytest.raises(InputError, match=r"write GiB, which is 2\*\*30 bytes"):
        parse_bytes("24GB")
    with pytest.raises(InputError, match=r"write MiB, which is 2\*\*20 bytes"):
        parse_bytes("24MB")


# Names and files


def test_an_unknown_recipe_is_refused_with_the_known_ones_and_the_nearest():
    with pytest.raises(InputError) as caught:
        load_recipe("tinny")
    message = str(caught.value)
    assert 'recipe "tinny" is not known; the nearest is "tiny"' in message
    assert all(name in message for name in list_recipes())


def test_a_name_is_no_way_out_of_the_recipe_folder(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny").model.name == "tiny"
    with pytest.raises(InputError, match="not known"):
        load_recipe("..")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content):
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"mine\.toml cannot be read: "):
        load_recipe(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(f"{tmp_path}/")


def test_a_file_is_read_with_its_overrides(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(SMALL, encoding="utf-8")
    assert load_recipe(str(path), ["train.seed=5"]).train.seed == 5
    with pytest.raises(InputError, match=r"mine\.toml: \[learner\] lr: got"):
        path.write_text(SMALL.replace("0.5", "0"), encoding="utf-8")
        load_recipe(str(path))


def test_recipes_in_an_installed_package_are_found_before_a_checkouts(tmp_path, monkeypatch):
    package = tmp_path / "frugal_rl"
    (package / "recipes").mkdir(parents=True)
    (package / "recipes" / "inside.toml").write_text("# inside\n" + SMALL, encoding="utf-8")
    monkeypatch.setattr(config, "__file__", str(package / "config.py"))
    assert list_recipes() == {"inside": "inside"}
    assert load_recipe("inside") == read_recipe(SMALL)


def test_a_header_ends_where_the_comments_end(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.toml").write_text("# a\n#\n#  b\n[model]\n# c\n", encoding="utf-8")
    monkeypatch.setattr(config, "__file__", str(tmp_path / "config.py"))
    assert list_recipes() == {"one": "a\n\n b"}


def test_reading_a_recipe_loads_neither_torch_nor_numpy():
    code = (
        "import sys, frugal_rl.config as c; c.load_recipe('tiny');"
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_number_of_the_schema_has_limits_that_its_default_keeps():
    for kind in (f.type for f in dataclasses.fields(Recipe)):
        section = getattr(config, kind)
        for field in dataclasses.fields(section):
            if field.default not in (dataclasses.MISSING, None):
                hint = config._hints(section)[field.name]
                assert config.fit(field.default, hint) == field.default
                with pytest.raises(ValueError):
                    config.fit(math.nan, hint)


def test_patience_needs_evaluations_to_be_patient_with():
    with pytest.raises(InputError, match=r"patience without eval_every"):
        read_recipe(SMALL, ["train.patience=3"])
    assert read_recipe(SMALL, ["train.patience=3", "train.eval_every=2"]).train.patience == 3


def test_the_kv_cache_is_compressed_where_a_budget_is_given():
    assert read_recipe(SMALL).rollout.compression is None
    given = read_recipe(SMALL, ["rollout.kv_budget=64"]).rollout.compression
    assert given == config.Compression("rkv", 64, 128)
    assert given.entries == 192
    rest = ["rollout.kv_buffer=7", "rollout.eviction=streaming"]
    given = read_recipe(SMALL, ["rollout.kv_budget=5", *rest]).rollout.compression
    assert given == config.Compression("streaming", 5, 7)
    whole = read_recipe(SMALL, ["rollout.kv_budget=64", "rollout.eviction=none"]).rollout
    assert whole.compression is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rollout.kv_budget=8"], 'kv_budget = 8 with eviction = "rkv".*at least 9'),
        (["rollout.kv_budget=4", "rollout.eviction=streaming"], "at least 5"),
        (["rollout.kv_budget=1", "rollout.eviction=h2o"], "at least 2"),
        (["rollout.eviction=h2o"], "eviction without kv_budget"),
        (["rollout.kv_buffer=64"], "kv_buffer without kv_budget"),
        (["rollout.eviction=snapkvv"], 'the nearest is "snapkv"'),
    ],
)
def test_a_kv_cache_that_cannot_be_is_refused(overrides, expected):
    with pytest.raises(InputError, match=expected):
        read_recipe(SMALL, overrides)


def test_llama_cpp_is_another_policy_than_the_learner_and_is_corrected():
    recipe = config.read_recipe(SMALL, ["rollout.generator=llama.cpp"])
    assert (recipe.rollout.gguf_format, config.correction_name(recipe)) == ("q8_0", "tis")
    assert config.read_recipe(SMALL).rollout.gguf_format is None
    message = refusal("rollout.generator=llama.cpp", "loss.correction=off")
    assert '[rollout] generator = "llama.cpp"' in message
    allowed = config.read_recipe(
        SMALL, ["rollout.generator=llama.cpp", "loss.correction=off", "loss.uncorrected=true"]
    )
    assert config.correction_name(allowed) == "off"


def test_keys_that_only_one_generator_has_are_refused_with_the_other():
    assert "leave gguf out" in refusal("rollout.gguf=bf16")
    message = refusal("rollout.generator=llama.cpp", "rollout.kv_budget=64")
    assert "evicts nothing" in message
    assert "q8_0" in refusal("rollout.generator=llama.cpp", "rollout.gguf=q4_0")
    assert "has no adapters" in refusal("rollout.generator=llama.cpp", "learner.kind=lora", "learner.rank=4")


@pytest.mark.parametrize("key", ["minibatches", "epochs"])
def test_an_algorithm_without_a_ratio_takes_one_step_of_a_rollout_batch(key):
    message = refusal("loss.algorithm=rloo", f"learner.{key}=2")
    assert f"{key} = 2" in message and "no ratio" in message and '"grpo"' in message
    assert config.read_recipe(SMALL, ["loss.algorithm=rloo"]).learner.epochs == 1
