"""The one sentence at the end of a plan, true for whatever came out."""

from collections.abc import Mapping, Sequence


def conclusion(
    pattern: str,
    everywhere: Mapping[int, float],
    where_faster: Mapping[int, float],
    unmeasured: Mapping[int, str],
    best: tuple[float, str, int] | None,
    *,
    of_device: bool,
) -> str:
    """Say how much faster a model is end to end; two decimals decide whether it is.

    Args:
        pattern: of the sparse matrices.
        everywhere: by batch, how many times as fast the model is with every matrix sparse.
        where_faster: the same with each matrix the faster of the two.
        unmeasured: by batch, why there is no such number, as half a sentence.
        best: the highest speed-up of a single product, of which matrix, at which batch; None if none was measured.
        of_device: whether launches are not counted.
    """
    parts = []
    if everywhere:
        parts.append(_end_to_end(pattern, everywhere))
        better = {batch: gain for batch, gain in where_faster.items() if _above(gain, max(everywhere[batch], 1.0))}
        if better:
            gains = ", ".join(f"{gain:.2f} times at batch {batch}" for batch, gain in better.items())
            parts.append(f"with only the faster matrices sparse {gains}")
    parts += [
        f"not measured end to end at batch {_listed([batch for batch in unmeasured if unmeasured[batch] == reason])} "
        f"({reason})"
        for reason in dict.fromkeys(unmeasured.values())
    ]
    if not everywhere:
        parts.append(_products(best))
    text = "; ".join(parts)
    text = f"{text[0].upper()}{text[1:]}."
    return f"{text} This is the GPU's own time: what launching its work costs is not counted." if of_device else text


def _end_to_end(pattern: str, everywhere: Mapping[int, float]) -> str:
    gains = [batch for batch, gain in everywhere.items() if _above(gain, 1.0)]
    others = [batch for batch in everywhere if batch not in gains]
    none = [f"{batch}{_slower(everywhere[batch])}" for batch in others]
    if not gains:
        return f"{pattern} makes this model no faster end to end at batch {_listed(none)}"
    first, *rest = gains
    text = f"at batch {first}, {pattern} makes this model {everywhere[first]:.2f} times as fast end to end"
    text += "".join(f", at batch {batch} {everywhere[batch]:.2f} times" for batch in rest)
    return f"{text}; no gain at batch {_listed(none)}" if others else text


def _above(gain: float, other: float) -> bool:
    return round(gain, 2) > round(other, 2)


def _slower(gain: float) -> str:
    return f" ({gain:.2f} times)" if round(gain, 2) < 1.0 else ""


def _products(best: tuple[float, str, int] | None) -> str:
    if best is None:
        return "no product was measured"
    gain, name, batch = best
    if not _above(gain, 1.0):
        return "no single product is faster sparse"
    return f"single products are up to {gain:.2f} times as fast ({name} at batch {batch})"


def _listed(items: Sequence[object]) -> str:
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
