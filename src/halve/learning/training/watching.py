"""What a training tells whoever watches it: a class of empty methods, to be filled by those who listen."""

from halve.learning.training.needs import Needs
from halve.learning.training.trainer import Point


class Watch:
    """Listens to a training and does nothing; subclasses do."""

    def phase(self, name: str) -> None:
        """Hear what begins: ``load``, ``text``, ``evaluate``, ``train``, ``write``."""

    def writing(self, done: int, wanted: int, seconds: float) -> None:
        """Hear how far the teacher's own text is: tokens written, tokens wanted, seconds that the rest takes."""

    def needs(self, needs: Needs) -> None:
        """Hear what the training will take, before it is refused or begins."""

    def trial(self, rate: float, loss: float) -> None:
        """Hear what the held-out text says of a learning rate after a short trial: nats a token, perhaps infinite."""

    def point(self, point: Point) -> None:
        """Hear what is known at a step."""
