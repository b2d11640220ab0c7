"""What a report says of the data that a model was calibrated on."""

from typing import Any

from halve.images.picture_set import PictureSet
from halve.text.calibration import CalibrationData
from halve.text.pairs import PairSet
from halve.text.tokens import TokenSet


def calibration_record(data: CalibrationData) -> dict[str, Any]:
    """Return what a report says of calibration data, as plain JSON values."""
    if isinstance(data, PairSet):
        return {
            "source": data.source,
            "samples": data.samples,
            "seq_len": data.seq_len,
            "pairs": f"fields {' and '.join(data.fields)}",
            "encoder_tokens": data.encoder_tokens,
            "decoder_tokens": data.decoder_tokens,
            "sha256": data.sha256,
        }
    if isinstance(data, PictureSet):
        return {
            "source": data.source,
            "samples": data.samples,
            "pictures": data.sizes,
            "processor": data.processor,
            "sha256": data.sha256,
        }
    if isinstance(data, TokenSet):
        sides = {"encoder_tokens": data.encoder_ids.numel(), "decoder_tokens": data.labels.numel()}
        return {
            "source": data.source,
            "samples": data.samples,
            "seq_len": data.seq_len,
            "tokens": data.tokens,
            "documents": data.documents,
            "separator": data.separator,
            "revision": data.revision,
            "bos": data.bos,
            "bos_ids": data.bos_ids,
            "sha256": data.sha256,
            **({} if data.cut is None else {"pairs": data.cut.how, **sides}),
        }
    return {"source": "batches" if data else "none", "batches": len(data)}
