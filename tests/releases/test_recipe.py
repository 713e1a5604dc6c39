"""Release recipes: what each key means, every refusal with its line, and that what is written comes back."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsa.errors import HsaError, RequestError
from hsa.methods.all_settings import all_settings
from hsa.methods.hsa import HsaSettings
from hsa.methods.settings import declared
from hsa.outputs.card import FIELDS
from hsa.releases.recipe import MAX_BYTES, Recipe, keys, load, loads

FOLDER = Path("/nowhere")
MERGE = "- {name: a, group: g, base: ./b, primary: ./p, secondary: ./s"


def read(text: str, folder: Path = FOLDER) -> Recipe:
    return loads(text.encode(), "r.yaml", folder)


def merges(*more: str) -> str:
    """A recipe whose only merge says `more` besides what it must."""
    return f"merges:\n{', '.join([MERGE, *more])}}}\n"


# --- meaning ----------------------------------------------------------------------------------------------------------


def test_defaults_and_merges() -> None:
    found = read(
        """
title: A tree
defaults:
  group: kids
  base: openai/whisper-tiny@v1
  k: 60
  lambda: 0.25
  card: {license: apache-2.0, role: domain-adapted, citation: "Somebody, 2026"}
merges:
  - name: one
    primary: org/first
    secondary: models/second
    lambda: 0.5
    base_id: openai/whisper-tiny
    max_shard_size: 5GB
  - name: two
    group: adults
    primary: /models/first
    secondary: ~/second
    k: null
    alpha: 2e-1
    numerics: reference
    load_dtype: float32
    card: {role: merge, license: null}
"""
    )
    assert (found.where, found.title) == ("r.yaml", "A tree")
    one, two = found.entries
    assert (one.path, one.line, two.path, two.line) == ("kids/one", 10, "adults/two", 16)
    assert one.task.sources == {
        "base": "openai/whisper-tiny@v1",
        "primary": "org/first",
        "secondary": "models/second",  # so it might be an organisation of that name
    }
    assert two.task.sources["primary"] == Path("/models/first")
    assert two.task.sources["secondary"] == Path.home() / "second"
    assert one.task.settings == HsaSettings(k=60, lam=0.5)
    assert two.task.settings == HsaSettings(lam=0.25, numerics="reference", load_dtype="float32")
    assert one.task.ids == {"base": "openai/whisper-tiny"}
    assert (one.task.max_shard_size, two.task.max_shard_size) == ("5GB", None)
    shared = {"license": "apache-2.0", "role": "domain-adapted", "citation": "Somebody, 2026"}
    assert one.card == {"release_group": "kids", **shared}
    assert two.card == {"release_group": "adults", "role": "merge", "citation": "Somebody, 2026"}
    request = one.request(Path("/tree"), threads=2, sync=False, overwrite=True)
    assert request.output == Path("/tree/kids/one")
    assert (request.threads, request.sync, request.overwrite) == (2, False, True)
    assert request.settings == one.task.settings


def test_parameters_per_tensor() -> None:
    found = read(merges("lambda: {layer.a: 0.1, layer.b: 1}"))
    assert found.entries[0].task.settings.lam == {"layer.a": 0.1, "layer.b": 1}


def test_models_in_their_order_are_those_by_name() -> None:
    named = read("merges:\n- {name: a, group: g, base: ./b, primary: org/one, secondary: ./two, primary_id: a/b}\n")
    in_order = read(
        "defaults: {base: ./b, primary: ./other, secondary: ./two, method: hsa}\n"
        "merges:\n- {name: a, group: g, models: [org/one, ./two], model_ids: [a/b, null]}\n"
    )
    assert in_order.entries[0].task.sources == named.entries[0].task.sources
    assert in_order.entries[0].task.ids == {"primary": "a/b", "secondary": None}
    for text, message in (
        ("models: [./m]", r"r\.yaml:2: merge 'a': method hsa merges 2 to 8 models, got 1"),
        ("models: ./m", r"r\.yaml:2: merge 'a': models must be a list of values"),
        ("method: none, models: [./m, ./n]", r"r\.yaml:2: merge 'a': method must be one of .*, got 'none'"),
        ("models: [./m, 3]", r"r\.yaml:2: model 2 of merge 'a' must be a text"),
    ):
        with pytest.raises(RequestError, match=message):
            read(f"merges:\n- {{name: a, group: g, base: ./b, {text}}}\n")


def test_paths_count_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    (folder / "org" / "first").mkdir(parents=True)
    (tmp_path / "elsewhere" / "models").mkdir(parents=True)
    recipe = folder / "r.yaml"
    recipe.write_text(
        "merges:\n- {name: a, group: g, base: ../base, primary: org/first, secondary: org/second}\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (recipe, Path(os.path.relpath(recipe))):
        sources = load(path).entries[0].task.sources
        assert sources["base"] == folder / "../base"
        assert sources["primary"] == folder / "org" / "first"
        assert sources["secondary"] == "org/second"
    (tmp_path / "elsewhere" / "org" / "second").mkdir(parents=True)
    with pytest.raises(
        RequestError, match=r":2: secondary of merge 'a': org/second is a hub id, .* also a path in the"
    ):
        load(recipe)


def test_the_shipped_recipe_is_sound() -> None:
    found = load(Path(__file__).resolve().parents[2] / "examples" / "whisper-scaling.yaml")
    sizes = ("tiny", "base", "small", "medium", "large-v3")
    assert [entry.task.sources["base"] for entry in found.entries] == [f"openai/whisper-{size}" for size in sizes]
    for entry in found.entries:
        assert entry.task.settings == HsaSettings(k=0.6, lam=0.5, alpha=0.2)
        assert {"role", "adaptation_context", "source_artifact", "citation", "license"} <= set(entry.card)


def test_the_recipe_of_the_documentation_is_sound() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "release.md").read_text(encoding="utf-8")
    block, other = [part for part in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "merges:" in part]
    (entry,) = read(block).entries
    assert [each.path for each in read(f"title: t\n{other}").entries] == [
        "scaling/small-ties",
        "scaling/small-hsa-of-three",
    ]
    assert entry.path == "scaling/tiny-hsa"
    assert entry.task.sources == {
        "base": "openai/whisper-tiny",
        "primary": "my-lab/tiny-older@COMMIT",
        "secondary": FOLDER / "../models/tiny-younger",
    }
    assert entry.task.settings == HsaSettings(k=0.6, lam=0.4)
    assert entry.card["adaptation_context"] == "read speech, ages 6 to 9"


# --- refusals ---------------------------------------------------------------------------------------------------------

TOP = "merges:\n- {name: a, group: g, base: ./b, primary: ./p, secondary: ./s}\n"
BAD = {
    "a list": ("- a\n", "r.yaml:1: the recipe must be a mapping of keys to values, got a list"),
    "a text": ("merges\n", "r.yaml:1: the recipe must be a mapping of keys to values, got 'merges'"),
    "no merges": ("title: x\n", "r.yaml: merges must be a list with at least one merge"),
    "empty merges": ("merges: []\n", "r.yaml: merges must be a list with at least one merge"),
    "merges by name": ("merges: {a: 1}\n", "r.yaml: merges must be a list with at least one merge"),
    "a merge that is a text": ("merges: [a]\n", "r.yaml:1: a merge must be a mapping of keys to values, got 'a'"),
    "an unknown key": (f"merge: 1\n{TOP}", "r.yaml:1: the recipe has the unknown key 'merge'; did you mean merges?"),
    "an unknown default": (
        f"{TOP}defaults:\n  workers: 1\n",
        "r.yaml:4: defaults has the unknown key 'workers'; there are group, base,",
    ),
    "a name in defaults": (
        f"{TOP}defaults: {{name: x}}\n",
        "r.yaml:3: defaults has the unknown key 'name'; each merge has a name of its own",
    ),
    "no defaults": (f"{TOP}defaults:\n", "r.yaml:3: defaults must be a mapping of keys to values, got None"),
    "a typo": (merges("lamda: 1"), "r.yaml:2: merge 'a' has the unknown key 'lamda'; did you mean lambda?"),
    "Python's name": (merges("lam: 1"), "r.yaml:2: merge 'a' has the unknown key 'lam'; did you mean lambda?"),
    "a dash": (
        merges("attention-scale: 1"),
        "r.yaml:2: merge 'a' has the unknown key 'attention-scale'; did you mean attention_scale?",
    ),
    "a machine's matter": (merges("threads: 2"), "r.yaml:2: merge 'a' has the unknown key 'threads'; "),
    "a field outside the card": (
        merges("citation: x"),
        "r.yaml:2: merge 'a' has the unknown key 'citation'; it is a field of the model card: write card: {citation: ",
    ),
    "an unknown field": (
        merges("card: {cite: x}"),
        "r.yaml:2: card has the unknown key 'cite'; did you mean citation?",
    ),
    "a card that is a text": (merges("card: x"), "r.yaml:2: card must be a mapping of keys to values, got 'x'"),
    "a field that is no text": (
        merges("card: {language: no}"),
        "r.yaml:2: card field language must be a text that says something, got False; put it in quotes",
    ),
    "an empty field": (merges("card: {role: ' '}"), "r.yaml:2: card field role must be a text that says something"),
    "no name": (
        "merges:\n- group: g\n  base: b\n",
        "r.yaml:2: the merge has no name",
    ),
    "no group": ("merges:\n- name: a\n", "r.yaml:2: merge 'a' has no group"),
    "no secondary": (
        "merges:\n- {name: a, group: g, base: b, primary: c}\n",
        "r.yaml:2: merge 'a' has no secondary; name a directory or a hub id",
    ),
    "a source taken back": (
        "defaults: {base: ./b}\nmerges:\n- {name: a, group: g, base: null, primary: ./p, secondary: ./s}\n",
        "r.yaml:3: merge 'a' has no base;",
    ),
    "a source that is a number": (
        "merges:\n- {name: a, group: g, base: 1, primary: ./p, secondary: ./s}\n",
        "r.yaml:2: base of merge 'a' must be a text that says something, got 1; put it in quotes",
    ),
    "a source of nobody's home": (
        "merges:\n- {name: a, group: g, base: ~nobody-of-that-name/b, primary: ./p, secondary: ./s}\n",
        "r.yaml:2: base of merge 'a': '~nobody-of-that-name/b' is no path: ",
    ),
    "k out of range": (
        "merges:\n- name: a\n  group: g\n  base: ./b\n  primary: ./p\n  secondary: ./s\n  k: 101\n",
        "r.yaml:7: merge 'a': k must be in [0, 100], got 101",
    ),
    "a bad default": (
        f"defaults:\n  k: 0.5\n  lambda: 2\n{TOP}",
        "r.yaml:3: merge 'a': lambda must be in [0, 1], got 2",
    ),
    "not a number": (merges("alpha: .nan"), "r.yaml:2: merge 'a': alpha must be finite and at least 0, got nan"),
    "a number in quotes": (merges("k: '0.6'"), "r.yaml:2: merge 'a': k must be a number in [0, 100], got '0.6'"),
    "a list of k": (merges("k: [0.1, 0.2]"), "r.yaml:2: merge 'a': k must be a number in [0, 100], got [0.1, 0.2]"),
    "a bad value for a tensor": (
        merges("k: {x: 200}"),
        "r.yaml:2: merge 'a': k of 'x' must be in [0, 100], got 200",
    ),
    "a preset": (merges("targets: all"), "r.yaml:2: merge 'a': targets must be one of encoder-qkv,"),
    "a list of presets": (merges("targets: [all]"), "r.yaml:2: merge 'a': targets must be one of encoder-qkv,"),
    "heads": (merges("num_heads: 0"), "r.yaml:2: merge 'a': num_heads must be a whole number from 1 to 10000, got 0"),
    "options that exclude each other": (merges("load_dtype: float32"), "r.yaml:2: merge 'a': load_dtype says how"),
    "a role": (merges("assets_from: me"), "r.yaml:2: merge 'a': assets_from must be one of base, primary,"),
    "a size": (merges("max_shard_size: big"), "r.yaml:2: merge 'a': max_shard_size must be a size such as 5GB"),
    "an id": (merges("base_id: ../x"), "r.yaml:2: merge 'a': base_id must be a hub id such as org/name"),
    "an id that is a number": (merges("base_id: 1"), "r.yaml:2: merge 'a': base_id must be a hub id such as org/name"),
    "an empty title": (f"title: ''\n{TOP}", "r.yaml:1: title must be a text that says something, got ''"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(HsaError) as caught:
        read(text)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "../x",
        "a/b",
        "/a",
        "a\\\\b",
        ".hidden",
        "-x",
        "x-",
        "x.",
        "a--b",
        "a..b",
        "a b",
        "é",
        "a\\n",
        "x" * 97,
    ],
)
@pytest.mark.parametrize("what", ["name", "group"])
def test_names_that_are_no_plain_component(what: str, name: str) -> None:
    given_names = {"name": "a", "group": "g", what: name}
    text = f'merges:\n- {{name: "{given_names["name"]}", group: "{given_names["group"]}", base: b, primary: b}}\n'
    with pytest.raises(RequestError, match=rf"^r.yaml:2: {what} .* must be a name that the Hub would take"):
        read(text)


@pytest.mark.parametrize("name", ["readme.md", "README.md", "Index.json"])
def test_groups_that_would_stand_in_the_way_of_the_index(name: str) -> None:
    with pytest.raises(RequestError, match="is the name of a file of the index"):
        read(TOP.replace("group: g", f"group: {name}"))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("name: a, group: g", r"r\.yaml:3: g/a would stand where g/a of line 2 does"),
        ("name: A, group: g", r"r\.yaml:3: g/A would stand where g/a of line 2 does"),
        ("name: b, group: G", r"r\.yaml:3: group 'G' differs from 'g' \(line 2\) in capital letters alone"),
    ],
)
def test_two_merges_at_one_place(second: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(f"{TOP}- {{{second}, base: ./b, primary: ./p, secondary: ./s}}\n")
    assert len(read(f"{TOP}- {{name: a, group: h, base: ./b, primary: ./p, secondary: ./s}}\n").entries) == 2


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(HsaError, match="recipe: cannot open"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(HsaError, match="is not a regular file"):
        load(tmp_path)
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RequestError, match=f"has {MAX_BYTES + 1} bytes, at most {MAX_BYTES} are read; split it"):
        load(tmp_path / "large.yaml")


# --- what is written comes back ---------------------------------------------------------------------------------------

IDS = ("base_id", "primary_id", "secondary_id")
NAMES = st.from_regex(r"[A-Za-z_][a-z0-9_]{0,8}", fullmatch=True)  # no numbers such as 8e8
IDENTIFIERS = st.builds("{}/{}".format, NAMES, NAMES)
EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
MODEL_INDEX = st.just('[{"name": "merged", "results": []}]')
TEXTS = st.text(min_size=1, max_size=30).filter(str.strip).filter(str.isprintable)
TEXTS = TEXTS.filter(lambda text: not EXPONENT.fullmatch(text))  # written without quotes, and read as a number
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "k": st.floats(0, 100) | st.integers(0, 100),
    "lambda": st.floats(0, 1) | st.dictionaries(TEXTS, st.floats(0, 1), min_size=1, max_size=2),
    "alpha": st.floats(0, 1e300),
    "targets": st.sampled_from(["encoder-qkv", "attention-qkv", "attention-all"]),
    "attention_scale": st.floats(-1e10, 1e10),
    "non_attention_scale": st.floats(-1e10, 1e10),
    "num_heads": st.integers(1, 64),
    "num_layers": st.integers(1, 64),
    "numerics": st.just("exact"),
    "weights": st.floats(0.1, 100) | st.lists(st.floats(-100, -0.1), min_size=1, max_size=1),
    "load_dtype": st.just("auto"),
    "dtype": st.sampled_from(["auto", "float32", "float16", "bfloat16"]),
    "only": st.lists(st.sampled_from(["encoder.*", "*fc?*", "[ab]c"]), min_size=1, max_size=3),
    "except": st.sampled_from(["*.bias", "decoder.*"]),
    "layers": st.sampled_from(["0", "4-11", "0,3"]) | st.integers(0, 9),
    "stack": st.sampled_from(["encoder", "decoder"]),
    "assets_from": st.sampled_from(["base", "primary", "secondary"]),
    "max_shard_size": st.integers(1, 10**12),
    **dict.fromkeys(IDS, IDENTIFIERS),
    "card": st.fixed_dictionaries({}, optional={**dict.fromkeys(FIELDS, TEXTS), "model_index": MODEL_INDEX}),
}


def test_every_key_has_values_here() -> None:
    others = {each.key for each in all_settings().values()} - {each.key for each in declared(HsaSettings)}
    assert {*VALUES, *others, "base", "primary", "secondary", "method", "models", "model_ids"} == {*keys()}


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    st.lists(
        st.fixed_dictionaries(
            {"name": NAMES, "group": NAMES, "base": IDENTIFIERS, "primary": IDENTIFIERS, "secondary": IDENTIFIERS},
            optional=VALUES,
        ),
        min_size=1,
        max_size=4,
        unique_by=(lambda merge: merge["name"].lower(), lambda merge: merge["group"].lower()),
    ),
    st.fixed_dictionaries({}, optional=VALUES),
)
def test_round_trip(written: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
    document = {"defaults": defaults, "merges": written}
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    found = read(yaml.dump(document, Dumper=dumper, sort_keys=False))
    assert len(found.entries) == len(written)
    for entry, merge in zip(found.entries, written, strict=True):
        wanted = {**defaults, **merge}
        card = {"release_group": merge["group"], **defaults.get("card", {}), **merge.get("card", {})}
        assert entry.card == card
        assert entry.path == f"{merge['group']}/{merge['name']}"
        assert entry.task.sources == {role: merge[role] for role in ("base", "primary", "secondary")}
        assert entry.task.ids == {name.removesuffix("_id"): wanted[name] for name in IDS if name in wanted}
        assert entry.task.shard_bytes == wanted.get("max_shard_size")
        assert entry.task.assets_from == wanted.get("assets_from", "primary")
        parameters = {
            **HsaSettings().as_dict(),
            **{each.key: wanted[each.key] for each in declared(HsaSettings) if each.key in wanted},
        }
        expected = HsaSettings.from_dict(parameters)
        assert entry.task.settings == expected
        assert entry.task.settings.as_dict() == expected.as_dict()
