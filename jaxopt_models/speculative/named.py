"""Drafters by the names that commands take."""

from jaxopt_models.checkpoint.hub import resolve
from jaxopt_models.checkpoint.load import load
from jaxopt_models.errors import UserError
from jaxopt_models.inference import for_device
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.speculative.adaptive import Adaptive
from jaxopt_models.speculative.dflash import DFlash
from jaxopt_models.speculative.dflash_files import is_dflash, read_dflash
from jaxopt_models.speculative.draft import Drafter
from jaxopt_models.speculative.draft_model import DraftModel
from jaxopt_models.speculative.eagle3 import Eagle3
from jaxopt_models.speculative.eagle3_files import is_eagle3, read_eagle3
from jaxopt_models.speculative.growth import TreeDrafter
from jaxopt_models.speculative.medusa import Medusa
from jaxopt_models.speculative.medusa_files import is_medusa, read_medusa
from jaxopt_models.speculative.mtp import Mtp
from jaxopt_models.speculative.mtp_files import is_mtp, read_mtp
from jaxopt_models.speculative.ngram import NGram

# What is trained for a model and says, place by place, how likely tokens are.
Head = Eagle3 | Mtp | Medusa | DFlash

_FILES = (
    (is_eagle3, read_eagle3),
    (is_mtp, read_mtp),
    (is_medusa, read_medusa),
    (is_dflash, read_dflash),
)


def load_drafter(
    name: str, target: ModelConfig, dtype: str | None = None
) -> NGram | DraftModel | Head:
    """What guesses, with as many tokens of a guess as its kind has by default.

    Args:
      name: "ngram", the directory of a head, or a model as `load` takes it.
      target: the model that it is to guess for.
      dtype: of the activations of a head or a model; None is the model's, or the checkpoint's.

    Raises:
      UserError: for a head or model that cannot be found or read.
    """
    if name == "ngram":
        return NGram()
    found = resolve(name)
    for is_its, read in _FILES:
        if is_its(found):
            return read(found, target, dtype=dtype or target.dtype)
    loaded = load(name, dtype=dtype)
    return DraftModel(loaded.config, for_device(loaded.config, loaded.params))


def as_tree(drafter: Drafter, shape: str) -> TreeDrafter:
    """A head that grows trees of a shape: "WIDTH,DEPTH,NODES", see `TreeDrafter`.

    Raises:
      UserError: for another drafter, or a shape that cannot be.
    """
    if not isinstance(drafter, Head):
        raise UserError(
            f"a tree {shape!r} grows from EAGLE-3, MTP, Medusa or DFlash heads; give one as --draft"
        )
    try:
        width, depth, count = (int(number) for number in shape.split(","))
    except ValueError:
        raise UserError(f"{shape!r} is no tree; say WIDTH,DEPTH,NODES, such as 8,6,32") from None
    return TreeDrafter(drafter, width, depth, count)


def as_adaptive(drafter: Drafter, levels: str) -> Adaptive:
    """A drafter that guesses as many tokens as pay: "0,1,3,7", or with what a pass costs at each,
    "0:1,1:1.1,3:1.2,7:1.5", see `Adaptive`.

    Raises:
      UserError: for other text, or levels that cannot be.
    """
    parts = [part.partition(":") for part in levels.split(",")]
    try:
        numbers = tuple(int(level) for level, _, _ in parts)
        costs = tuple(float(cost) for _, colon, cost in parts if colon)
    except ValueError:
        raise UserError(
            f"{levels!r} are no levels; say numbers of guesses such as 0,1,3,7, or with what a "
            "pass costs at each, such as 0:1,1:1.1,3:1.2,7:1.5"
        ) from None
    return Adaptive(drafter, numbers, costs or None)
