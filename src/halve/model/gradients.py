"""Gradients with respect to the matrices of a model's blocks, of one calibration sample after the other.

What scores need of them is ``√Σ g²`` over the samples: of the language model's loss, for which the dense model is run
forwards and backwards once for every sample, or of the norm of a block's output, which takes that block alone. Each
gradient is squared and added to one float32 sum as soon as it is complete, so that no two are held at a time.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from halve.device import own_settings
from halve.errors import CalibrationError, InputError
from halve.maths.linalg import is_finite
from halve.memory import check_memory
from halve.model.blocks import Batch
from halve.model.calls import hidden_of, to_device
from halve.model.plan import Plan
from halve.model.reconstruct import Example, requiring_gradients
from halve.model.stream import call_block

_CPU = torch.device("cpu")
_FED, _IDS, _LABELS = "decoder_input_ids", "input_ids", "labels"
_TEXT = {_IDS, "attention_mask", "position_ids", "token_type_ids"}
"""What a batch of plain text has."""
_PROBE = 16
"""Tokens of the sample that shows what a model predicts, and what it keeps for a backward pass."""
_SAME = 1e-5
"""How far logits may move, as a share of the largest, where they are to depend on earlier tokens alone."""


class SquaredGradients:
    """Sums ``g²`` of parameters over samples, each sample one backward pass.

    Args:
        parameters: by name; whatever else is in the model gets no gradient meanwhile.
        device: where the sums are kept, 4 bytes a weight.

    Attributes:
        samples: number of backward passes so far.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device = _CPU) -> None:
        self.samples = 0
        self._parameters = dict(parameters)
        self._device = device
        self._sums = {
            name: torch.zeros(parameter.shape, dtype=torch.float32, device=device)
            for name, parameter in parameters.items()
        }

    def add(self, model: nn.Module, samples: Iterator[Callable[[], Tensor]]) -> None:
        """Take the gradient of one sample after the other.

        Args:
            model: what the parameters belong to.
            samples: each returns the number, a tensor, of which the gradient is taken.

        Raises:
            CalibrationError: a number is not finite.
        """
        with ExitStack() as stack:
            stack.enter_context(requiring_gradients(model, self._parameters.values()))
            for name, parameter in self._parameters.items():
                handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._square, name)
                )
                stack.callback(handle.remove)
            stack.enter_context(torch.enable_grad())
            for sample in samples:
                value = sample()
                if not bool(value.detach().isfinite()):
                    raise CalibrationError(
                        f"calibration sample {self.samples} gives {value.item()}, of which no gradient can be taken: "
                        "check the model in this dtype, or use other text"
                    )
                if value.requires_grad:  # none of the parameters took part otherwise: gradients of zero
                    value.backward()  # type: ignore[no-untyped-call]
                self.samples += 1

    def _square(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            gradient = gradient.detach().to(torch.float32)
            self._sums[name].add_(gradient.square_().to(self._device))
            parameter.grad = None

    def roots(self) -> dict[str, Tensor]:
        """Return ``√Σ g²`` of every parameter, in its shape; the sums are used up.

        Raises:
            CalibrationError: one is not finite.
        """
        for name, total in self._sums.items():
            if not is_finite(total):
                raise CalibrationError(
                    f"the gradients of {name} are not finite, or overflow float32: check the model, or use other text"
                )
        return {name: total.sqrt_() for name, total in self._sums.items()}


def one_by_one(batches: Sequence[Batch]) -> list[Batch]:
    """Cut batches into samples, since a gradient is taken of each by itself.

    Raises:
        InputError: a batch holds several samples whose tensors cannot be told apart by their first dimension.
    """
    samples: list[Batch] = []
    for index, batch in enumerate(batches):
        lengths = {len(value) if value.ndim else 0 for value in batch.values()}
        named = batch.get(_FED, batch.get(_IDS))
        if len(lengths) == 1 and 0 not in lengths:
            samples += [{key: value[i : i + 1] for key, value in batch.items()} for i in range(*lengths)]
        elif named is not None and len(named) == 1:
            samples.append(dict(batch))
        else:
            raise InputError(
                f"calibration batch {index} has tensors of {sorted(lengths)} rows, and gradients are taken of one "
                "sample at a time: give batches of one sample each"
            )
    return samples


def loss_of(model: nn.Module, sample: Batch) -> Tensor:
    """Return the mean cross-entropy of a sample, float32: its labels', or else that of its own next tokens.

    Args:
        model: with logits over a vocabulary; or one that returns a ``loss`` where ``sample`` has labels.
        sample: a batch of one.
    """
    if _LABELS in sample:
        loss: Tensor = model(**sample).loss
        return loss.float()
    fed = _FED if _FED in sample else _IDS
    mask = sample.get("decoder_attention_mask" if fed == _FED else "attention_mask")
    logits = model(**sample).logits[0, :-1]
    losses = F.cross_entropy(logits.float(), sample[fed][0, 1:], reduction="none")
    if mask is None:
        return losses.mean()
    counted = (mask[0, 1:] * mask[0, :-1]).to(losses.dtype)
    return (losses * counted).sum() / counted.sum()


class LossGradients:
    """Gradients of the dense model's loss, after one pass over all samples.

    Memory: 4 bytes for every weight of the blocks' matrices, on the CPU; a float32 copy of the model, unless it is
    float32 and runs on the CPU; what the model keeps of one sample for its backward pass; and the largest gradient.

    Args:
        model: the dense model, on the CPU.
        plan: what will be pruned of it.
        samples: of the calibration set (`one_by_one`).
        device: where the model is run.
        method: that asks for it, for messages.

    Raises:
        InputError: the samples give no loss (`_check_loss`), or there is less memory than that.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, samples: Sequence[Batch], device: torch.device, method: str
    ) -> None:
        self._model = model
        self._samples = samples
        self._device = device
        self._names = sorted({matrix.parameter for matrix in plan.matrices})
        self._copied = device.type != "cpu" or any(
            parameter.is_floating_point() and parameter.dtype != torch.float32 for parameter in model.parameters()
        )
        for index, sample in enumerate(samples):
            _check_sample(sample, index, model, method)
        kept = _check_loss(model, samples[0], method, self._parameters(model).values())
        self._check_memory(kept, method)

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: model.get_parameter(name) for name in self._names}

    def _check_memory(self, kept: float, method: str) -> None:
        """Refuse what cannot fit: ``kept`` bytes a token, and what else the class says."""
        sizes = [parameter.numel() for parameter in self._parameters(self._model).values()]
        longest = max(_tokens(sample) for sample in self._samples)
        work = int(kept * longest) + 4 * max(sizes)
        copied = 4 * sum(each.numel() for each in self._model.parameters()) if self._copied else 0
        sums = 4 * sum(sizes)
        what = f"the gradients that {method} weighs ({sums / 1e9:.1f} GB of sums"
        what += f", {copied / 1e9:.1f} GB for a float32 copy of the model" if copied else ""
        what += f", {work / 1e9:.1f} GB for a sample of {longest} tokens)"
        remedy = "use wanda++, which takes them block by block, or shorter sequences (seq_len)"
        if self._device.type == "cpu":
            check_memory(what, sums + copied + work, remedy)
        else:
            check_memory(what, sums, remedy)
            check_memory(what, copied + work, remedy, self._device)

    def roots(self, precision: torch.dtype) -> dict[str, Tensor]:
        """Return ``√Σ g²`` of every pruned parameter by name, float32 on the CPU, in the parameter's shape.

        Args:
            precision: in which float32 matrices are multiplied.

        Raises:
            CalibrationError: a loss or a gradient is not finite.
        """
        model = self._model
        if self._copied:
            model = copy.deepcopy(model).to(device=self._device, dtype=torch.float32)
        sums = SquaredGradients(self._parameters(model))

        def loss(sample: Batch) -> Tensor:
            with torch.autocast(self._device.type, precision, enabled=precision != torch.float32):
                return loss_of(model, to_device(dict(sample), self._device, torch.float32))

        with own_settings(model):
            sums.add(model, (partial(loss, sample) for sample in self._samples))
        return sums.roots()


def output_gradients(
    block: nn.Module,
    names: Collection[str],
    examples: Callable[[int], Example],
    count: int,
    precision: torch.dtype,
) -> dict[str, Tensor]:
    """Return ``√Σ g²`` of a block's parameters, g the gradient of ``‖B(x)‖₂`` of one sample.

    Args:
        block: in float32, dense.
        names: of the parameters in ``block``.
        examples: gives sample number i; its target is not used.
        count: number of samples.
        precision: dtype of the products in forward and backward passes.

    Returns:
        dict[str, Tensor]: by name, float32, in the parameter's shape, on the device of ``block``.

    Raises:
        CalibrationError: a norm or a gradient is not finite.
    """
    parameters = {name: block.get_parameter(name) for name in names}
    sums = SquaredGradients(parameters, next(iter(parameters.values())).device)

    def size(index: int) -> Tensor:
        example = examples(index)
        with torch.autocast(example.hidden.device.type, precision, enabled=precision != torch.float32):
            output: Tensor = hidden_of(call_block(block, example.hidden, example.call))
        output = output.float()
        norm: Tensor = (output if example.valid is None else output[example.valid]).norm()
        return norm

    sums.add(block, (partial(size, index) for index in range(count)))
    return sums.roots()


def _tokens(sample: Batch) -> int:
    return max(value.shape[-1] for key, value in sample.items() if key in {_IDS, _FED, _LABELS})


def _check_sample(sample: Batch, index: int, model: nn.Module, method: str) -> None:
    """Refuse a sample whose tokens no loss can be taken of."""
    if _LABELS in sample:
        return
    advice = "give batches with labels, or use wanda++, which needs no loss"
    fed = sample.get(_FED, None if sample.keys() - _TEXT else sample.get(_IDS))
    if fed is None:
        raise InputError(
            f"{method} needs the loss of a language model, and calibration batch {index} has {', '.join(sample)} for "
            f"{type(model).__name__}: {advice}"
        )
    if fed.shape[1] < 2:
        raise InputError(f"{method} needs samples of two tokens or more, and calibration sample {index} has one")


def _check_loss(model: nn.Module, sample: Batch, method: str, trained: Collection[nn.Parameter]) -> float:
    """Refuse a model that does not predict the next token; return the bytes it keeps a token for a backward pass.

    Raises:
        InputError: it has no logits over its vocabulary, or they depend on the tokens that they are to predict.
    """
    advice = "give batches with labels, or use wanda++, which needs no loss"
    name, labelled = type(model).__name__, _LABELS in sample
    fed = _FED if _FED in sample else _IDS
    short = dict(sample)
    if not labelled:
        short |= {key: value[:, :_PROBE] for key, value in sample.items() if key in _TEXT or key.startswith("decoder_")}
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    short = {key: value.to(dtype) if value.is_floating_point() else value for key, value in short.items()}
    with own_settings(model), _counting_kept(model, trained) as kept:
        output = model(**short)
    if labelled:
        if not isinstance(getattr(output, "loss", None), Tensor):
            raise InputError(f"{method} needs a loss, and {name} returns none for batches with labels: use wanda++")
        return sum(kept) / _tokens(short)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != short[fed].shape:
        raise InputError(
            f"{method} needs the loss of a language model, and {name} gives no logits of its tokens: {advice}"
        )
    other = short[fed].clone()
    other[:, -1] = (other[:, -1] + 1) % logits.shape[-1]
    with torch.no_grad(), own_settings(model):
        again = model(**{**short, fed: other}).logits
    moved = (again[:, :-1].float() - logits[:, :-1].detach().float()).abs().amax()
    if float(moved) > _SAME * float(logits.detach().abs().amax()):
        raise InputError(
            f"{method} needs the loss of the next token, and the logits of {name} depend on that token itself, as in "
            f"an encoder: {advice}"
        )
    return sum(kept) / _tokens(short)


@contextmanager
def _counting_kept(model: nn.Module, trained: Collection[nn.Parameter]) -> Iterator[list[int]]:
    """Yield a list of the bytes, in float32, that the passes inside keep for a backward pass, once for each tensor."""
    found: list[int] = []
    seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in seen:
            seen.add(address)
            alive.append(tensor)
            found.append(tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size()))
        return tensor

    with requiring_gradients(model, trained), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield found
        alive.clear()
