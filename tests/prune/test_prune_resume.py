"""A run that is killed, wherever, ends as it would have, and does nothing twice that was done."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import CONFIGS, params_of, tokens

from jaxopt_models.errors import UserError
from jaxopt_models.models.model import Model
from jaxopt_models.prune import cut, per_layer, run, search
from jaxopt_models.prune.damage import Damage
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.prune.stages import Stages
from jaxopt_models.prune.teaching import School

FIELDS: dict[str, Any] = {
    "budget": {"latency": 0.9},
    "axes": ["layers", "hidden", "neurons"],
    "multiple": 8,
    "batch": 2,
    "uniform": False,
    "rescale_norms": True,
    "sparsity": {"pattern": "2:4", "method": "magnitude"},
    "search": {"candidates": 1, "first": 2, "finalists": 2, "least": 0.5}
    | {"per_layer": {"widths": 1, "windows": 2}, "distill": {"steps": 1}},
}
MODEL = Model(CONFIGS["tied"], params_of("tied"))
TEXT, OTHER = [tokens(2, seed=i) for i in range(2)], [tokens(2, seed=9)]
ROWS = np.asarray(tokens(4, seed=3))


def _seconds(config: Any, params: Any) -> float:
    return 1e-4 + 1e-6 * len(params["layers"]) * (config.hidden_size + config.intermediate_size)


class Killed(BaseException):
    """As a signal would end the process."""


class Work:
    """What is done, in order; ends the process in the middle of a piece."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.killed_at: int | None = None

    def does(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            if len(self.done) == self.killed_at:
                raise Killed
            self.done.append(name)
            return function(*args, **options)

        return counted

    def prune(self, directory: Path | None, fields: Any = FIELDS, killed_at: int | None = None):
        """(config, params, report without seconds), and what was done."""
        self.done, self.killed_at = [], killed_at
        settings = PruneSettings.model_validate(fields)
        clock = self.does("clock", _seconds)
        given: Any = {"training": ROWS, "resume": directory, "clock": clock}
        config, params, report = run.prune(MODEL, settings, TEXT, OTHER, **given)
        return config, params, report.as_dict() | {"seconds": None}


@pytest.fixture
def work(monkeypatch) -> Work:
    work = Work()
    for module, name in ((cut, "importance"), (cut, "norm_gains"), (run, "sparsify")):
        monkeypatch.setattr(module, name, work.does(name, getattr(module, name)))
    monkeypatch.setattr(search, "damage", work.does("round", search.damage))
    monkeypatch.setattr(per_layer, "damage", work.does("layer", per_layer.damage))

    def teach(self, config, params):
        return jax.tree.map(lambda x: x * 0.9, params)

    def examine(self, config, params):
        return Damage(0.0, float(jnp.sum(jnp.abs(params["norm"]["weight"]))), 0.0)

    monkeypatch.setattr(School, "teach", work.does("teach", teach))
    monkeypatch.setattr(School, "examine", examine)
    return work


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_the_same(work, tmp_path):
    expected = work.prune(None)
    whole = work.done
    kinds = {"importance", "clock", "layer", "round", "norm_gains", "teach", "sparsify"}
    assert set(whole) == kinds
    last = {name: place for place, name in enumerate(whole)}  # where each kind of work ends
    for place in (*last.values(), whole.index("clock") + 1):
        directory = tmp_path / str(place)
        with pytest.raises(Killed):
            work.prune(directory, killed_at=place)
        assert work.done == whole[:place]
        found = work.prune(directory)
        rest = len(whole) - len(work.done)
        assert work.done == whole[rest:] and rest <= place
        # Only what was being done begins anew, as a round of several widths.
        assert rest == place or whole[place] in ("round", "norm_gains")
        assert set(whole[rest:place]) <= {"norm_gains", "round"}
        _same(found, expected)
    # And there is nothing left to do.
    _same(work.prune(directory), expected)
    assert work.done == []


def _same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0] and found[2] == expected[2]
    ours, theirs = jax.tree.leaves_with_path(found[1]), jax.tree.leaves_with_path(expected[1])
    for (path, a), (other, b) in zip(ours, theirs, strict=True):
        assert path == other and a.dtype == b.dtype and bool(jnp.array_equal(a, b))


def test_another_run_is_not_gone_on_with(work, tmp_path):
    with pytest.raises(Killed):
        work.prune(tmp_path, killed_at=len(["importance"]))  # before anything that a budget decides
    cheaper = FIELDS | {"budget": {"parameters": 0.9}}
    work.prune(tmp_path, cheaper)
    assert "importance" not in work.done
    for changes, says in [({"seed": 1}, "seed"), ({"budget": {"parameters": 0.8}}, "budget")]:
        with pytest.raises(UserError, match=f"was made with another {says}; go on with the same"):
            work.prune(tmp_path, cheaper | changes)
    for name in ("MODEL", "TEXT"):
        with pytest.MonkeyPatch.context() as patch:
            changed = Model(MODEL.config, jax.tree.map(lambda x: x * 2, MODEL.params))
            patch.setitem(globals(), name, {"MODEL": changed, "TEXT": TEXT[::-1]}[name])
            said = {"MODEL": "model", "TEXT": "calibration"}[name]
            with pytest.raises(UserError, match=f"importance.npz was made with another {said}"):
                work.prune(tmp_path, cheaper)


def test_what_is_damaged_is_named(tmp_path):
    stages, like = Stages(tmp_path, {"run": 1}), {"a": jnp.zeros(3), "b": None}
    kept = stages.arrays("some", lambda: {"a": jnp.arange(3.0), "b": None}, like)
    assert kept["b"] is None and kept["a"].tolist() == [0, 1, 2]
    again = stages.arrays("some", lambda: pytest.fail("was kept"), like)
    assert again["b"] is None and again["a"].tolist() == [0, 1, 2]
    assert stages.remember()("one", lambda: {"x": (0.1, 1 / 3)}) == {"x": [0.1, 1 / 3]}
    assert stages.remember()("one", lambda: pytest.fail("was kept")) == {"x": [0.1, 1 / 3]}
    for file in ("some.npz", "one.json"):
        path = tmp_path / file
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(UserError, match=f"{file} is damaged .*remove .* to begin anew"):
            stages.remember()("one", dict) if file == "one.json" else stages.arrays(
                "some", dict, like
            )
