from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.targets import BadPattern, Patterns, Targets, per_module

MODULES = [
    f"model.layers.{i}.{part}"
    for i in (0, 1, 2, 11)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.1.up_proj")
] + ["lm_head", "model.q_proj_extra"]
names = st.sampled_from(
    ["q_proj", "v_proj", "down_proj", "proj", "self_attn.q_proj", "layers", *MODULES[:6]]
)
patterns = st.sampled_from(
    [
        r".*\.q_proj",
        r".*(q|v)_proj$",
        r"model\.layers\.(0|2)\..*",
        r"q_proj",
        r".*layers\.[01]{1,2}\..*",
        r"^(?!.*mlp).*_proj",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    modules=st.lists(names, max_size=3) | patterns,
    exclude=st.lists(names, max_size=2) | patterns | st.just(()),
    layers=st.none() | st.lists(st.integers(0, 12), max_size=3),
    layers_pattern=st.lists(st.sampled_from(["layers", "experts"]), max_size=2),
)
def test_the_same_modules_as_peft(modules, exclude, layers, layers_pattern):
    from peft.tuners.tuners_utils import check_target_module_exists

    if isinstance(modules, str):
        layers, layers_pattern = None, []
    config = SimpleNamespace(
        target_modules=modules,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
    )
    expected = set()
    for module in MODULES:
        try:
            if check_target_module_exists(config, module):
                expected.add(module)
        except UnboundLocalError:  # peft trips over layers_pattern=[] for a path without numbers
            pass
    targets = Targets(
        modules if isinstance(modules, str) else tuple(modules),
        exclude if isinstance(exclude, str) else tuple(exclude),
        None if layers is None else frozenset(layers),
        tuple(layers_pattern),
    )
    assert targets.among(MODULES) == expected


def test_all_linear_leaves_out_the_output_layer():
    assert Targets("all-linear").among(["model.a", "lm_head"]) == {"model.a"}


@given(
    st.lists(st.sampled_from(["q_proj", "proj", r".*\.0\..*", "^model.*v_proj", r"1\..*"])),
    st.sampled_from(MODULES),
)
def test_the_same_key_as_peft(keys, module):
    from peft.utils.other import get_pattern_key

    found = per_module(Patterns(), {k: k for k in keys}, [module])
    assert found.get(module, module) == get_pattern_key(keys, module)


@pytest.mark.parametrize(
    "pattern",
    [
        "(((a{999}){999}){999})",
        "(a+)+$",
        "(a|aa)*b",
        "(?x) (a) *",
        "(?R)",
        "(?P<n>a)(?P>n)",
        "a{e<=1}",
        "a{100}",
        "(" * 100 + ")" * 100,
        "a" * 5000,
        "(",
        "[",
        "*",
        "\\",
    ],
)
def test_patterns_that_could_do_harm_are_refused(pattern):
    with pytest.raises(BadPattern):
        Patterns().match(pattern, "a" * 40)


def test_matching_stops_when_its_time_is_up():
    started = time.monotonic()
    with pytest.raises(BadPattern, match="too long"):
        Patterns(0.2).match("(a|aa)" * 60 + "b", "a" * 100)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\."
        r"[\d]{1,}\.(?:self_attn|attention)\.(?:(?:q_proj|k_proj)))",
        r"^(?!.*visual).*(?:q_proj|k_proj|gate_proj).*",
        r"model\.layers\.([0-9]|1[0-5])\.self_attn\.(q|v)_proj",
    ],
)
def test_patterns_that_trainers_write_are_taken(pattern):
    assert Patterns().fullmatch(pattern, "model.layers.3.self_attn.q_proj")
