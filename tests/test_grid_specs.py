"""The specs of operators on grids, the calls that they refuse, and the sites that take them."""

import dataclasses
import json

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from test_grid_operators import ANY, SPECS, call_of, layout_of, learned_of, make, run

from attnconvert.convert.hosts.sites import Site, SiteOperators, Unsupported, refusal
from attnconvert.convert.recipe_fields import OperatorSpec
from attnconvert.kernels import grid
from attnconvert.kernels.spec import (
    OPERATORS,
    Agent,
    Disc,
    Frames,
    Full,
    Hybrid,
    Linear,
    Neighbourhood,
    Radial,
    References,
    Retention,
    Sla,
    Span,
    Sparse,
    Tiles,
    Timed,
    TopBlocks,
    Window,
    grid_axes,
    grid_only,
    label,
    spec_from_dict,
    spec_to_dict,
)


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_specs_round_trip_through_plain_data(spec):
    given = spec_to_dict(spec)
    assert spec_from_dict(given) == spec
    assert spec_from_dict(json.loads(json.dumps(given))) == spec
    assert spec_from_dict(yaml.safe_load(yaml.safe_dump(given))) == spec
    torch.nn.Module().add_module(label(spec), torch.nn.Linear(1, 1))
    assert not set(label(spec)) & set(".,/ []()'")


def test_recipes_take_lists_and_operators_in_operators_and_have_a_schema():
    adapter = TypeAdapter(OperatorSpec)
    given = {"operator": "timed", "early": {"operator": "tiles", "tile": [4, 8]}, "late": {"operator": "disc"}}
    spec = adapter.validate_python(given)
    assert spec == Timed(early=Tiles(tile=(4, 8)), late=Disc())
    assert adapter.validate_python(adapter.dump_python(spec)) == spec
    assert adapter.validate_python({"operator": "frames", "before": 8, "chunk": 4}) == Frames(before=8, chunk=4)
    for wrong, where in (({"tile": [0]}, "tile"), ({"late": {"operator": "disk"}}, "late")):
        with pytest.raises(ValueError, match=where):
            adapter.validate_python(given | {"operator": "timed" if where == "late" else "tiles"} | wrong)
    schema = json.dumps(adapter.json_schema())
    assert '"default": {"operator": "full"}' in schema


def test_labels_are_distinct_and_every_operator_has_defaults():
    specs = list(dict.fromkeys([*SPECS, *(cls() for cls in OPERATORS.values()), Disc(radius=2.5), Span(growth=0.5)]))
    assert len({label(spec) for spec in specs}) == len(specs)
    assert label(Disc(radius=8.0)) == label(Disc(radius=8)) == "disc-8"
    assert label(Neighbourhood(window=[3, 5], dilation=2)) == "neighbourhood-3x5-dilation2"
    assert label(Timed(late=Sparse(mass=0.9))) == "timed-0p8-full-sparse-0-64-mass0p9"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"operator": "disc", "radius": 0}, "greater than 0"),
        ({"operator": "disc", "pool": 1}, "at least 2"),
        ({"operator": "neighbourhood", "window": [3, 3], "stride": [1, 1, 1]}, "window has 2, stride has 3"),
        ({"operator": "neighbourhood", "window": 3, "stride": 4}, "at most the window"),
        ({"operator": "neighbourhood", "window": []}, "sequence of whole numbers"),
        ({"operator": "tiles", "tile": [0, 4]}, "at least 1"),
        ({"operator": "frames", "before": 4, "chunk": 3}, "whole chunks of 3"),
        ({"operator": "references", "every": 0, "at": []}, "name reference frames"),
        ({"operator": "sparse", "keep": 0}, "one of them"),
        ({"operator": "sparse", "block": 48}, "multiple of 32"),
        ({"operator": "sla", "mass": 1.5}, "share from 0 to 1"),
        ({"operator": "linear", "conv": 4}, "odd"),
        ({"operator": "linear", "feature_map": "elu"}, "known are hedgehog, elu1, softmax"),
        ({"operator": "timed", "above": 0}, "greater than 0"),
        ({"operator": "timed", "late": {"operator": "disk"}}, "did you mean 'disc'"),
        ({"operator": "timed", "late": 3}, "must be an operator"),
        ({"operator": "timed", "late": {"operator": "linear", "augment": True}}, "cannot have augment"),
    ],
)
def test_bad_specs_say_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        spec_from_dict(given)


# ------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("spec", [s for s in SPECS if not isinstance(s, Timed) and grid_only(s)], ids=label)
def test_a_call_that_does_not_fit_is_refused(spec):
    if isinstance(spec, Linear) and not spec.conv:
        pytest.skip("reads no grid")
    size = (3, 5, 4) if grid_axes(spec) == 3 else (5, 7)
    layout = layout_of(size, (0, 0))
    q, k, v = make(layout)
    learned = learned_of(spec)
    call = call_of(layout)
    with pytest.raises(ValueError, match=f"{label(spec)} needs the grid"):
        run(spec, q, k, v, dataclasses.replace(call, layout=None), learned)
    with pytest.raises(ValueError, match="but the call has"):
        run(spec, q, k, v, dataclasses.replace(call, layout=layout_of(size, (1, 0))), learned)
    with pytest.raises(ValueError, match="causal"):
        run(spec, q, k, v, dataclasses.replace(call, causal=True), learned)
    with pytest.raises(ValueError, match="sliding window"):
        run(spec, q, k, v, dataclasses.replace(call, limit=4), learned)
    with pytest.raises(ValueError, match="'row'"):
        run(spec, q, k, v, dataclasses.replace(call, layout=grid.in_tiles(layout, (2,))), learned)


@pytest.mark.parametrize("spec", [Radial(), References(), Frames(), Tiles(tile=(4, 8, 8))], ids=label)
def test_what_is_for_videos_refuses_images(spec):
    layout = layout_of((5, 7), (0, 0))
    with pytest.raises(ValueError, match="is for a video"):
        run(spec, *make(layout), call_of(layout), None)


def site(**settings):
    return Site("blocks.0.attn", 0, 4, 4, 8, **({"causal": False, "axes": 2, "text": "first"} | settings))


def test_a_site_on_a_grid_takes_grid_operators_and_says_which_instead_of_others():
    for spec in (Window(), Span(), Hybrid(), Retention()):
        assert "instead" in refusal(site(), spec)
    for spec in (Full(), TopBlocks(), Linear(), Linear(conv=3), *ANY):
        assert refusal(site(), spec) is None
        assert refusal(site(axes=3), spec) is None
    for spec in (Radial(), References(), Frames(), Timed(late=Radial())):
        assert "video" in refusal(site(), spec)
        assert refusal(site(axes=3), spec) is None
    assert "image" in refusal(site(axes=3), Tiles(tile=(8, 8)))
    assert "instead" in refusal(site(), Timed(late=Window()))


def test_a_site_of_a_sequence_takes_no_grid_operator():
    for spec in SPECS:
        assert (refusal(site(axes=0, text=""), spec) is not None) == grid_only(spec), label(spec)


def test_augment_serves_whole_sites_only():
    whole, part = Linear(augment=True), Linear()
    learned = SiteOperators(site(), [whole] * 4).learned(whole)
    assert learned.augment_q.mlp[0].in_features == 32
    with pytest.raises(Unsupported, match="all heads"):
        SiteOperators(site(), [whole, part, part, part])


def test_a_site_runs_a_plan_that_mixes_operators():
    specs = [Disc(radius=2), Sla(keep=0.3, block=32), Timed(above=0.5, late=Agent(agents=2)), Full()]
    layout = layout_of((5, 7), (3, 0))
    q, k, v = make(layout, torch.float32, heads=4, kv=4)
    mine = SiteOperators(site(), specs)
    got = mine(q, k, v, call_of(layout))
    for n, spec in enumerate(specs):
        one = [x[:, n : n + 1] for x in (q, k, v)]
        want = run(spec, *one, call_of(layout), mine.learned(spec))
        torch.testing.assert_close(got[:, n : n + 1], want, atol=1e-5, rtol=1e-5)
