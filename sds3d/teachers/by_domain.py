"""A teacher whose images of normals are judged by another teacher, or by itself under other words.

A step shows one domain, so its images are encoded, noised and judged by one teacher: `sds3d.teachers.base.answerer`
chooses it. The two may differ in image size, space and schedule.
"""

from __future__ import annotations

from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.diffusion.noise import Prediction
from sds3d.domains import split_domain
from sds3d.teachers.base import Teacher, answerer, domains_of


class Delegate:
    """A teacher that answers as another one does, except for what a subclass changes."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.schedule, self.image_size, self.shape = teacher.schedule, teacher.image_size, teacher.shape
        self.views, self.dtype = teacher.views, teacher.dtype

    def worded(self, prompt: str) -> str:
        """Return a prompt as the teacher gets it."""
        return prompt

    def encode(self, images: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.encode`."""
        return self.teacher.encode(images)

    def decode(self, x: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.decode`."""
        return self.teacher.decode(x)

    def check(self, prompt: str) -> None:
        """See `sds3d.teachers.base.Teacher.check`."""
        self.teacher.check(self.worded(prompt))

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,
    ) -> Prediction:
        """See `sds3d.teachers.base.Teacher.predict`."""
        return self.teacher.predict(x_t, t, [self.worded(prompt) for prompt in prompts], cameras, camera_mask)


class Worded(Delegate):
    """A teacher with words before each prompt, in the place of the word of a domain.

    Args:
        teacher: answers.
        words: such as "normal map of"; "" for none. They stay in the null prompt, as the word of a domain does.
    """

    def __init__(self, teacher: Teacher, words: str):
        super().__init__(teacher)
        self.words = words

    def worded(self, prompt: str) -> str:
        """See `Delegate.worded`."""
        return " ".join(filter(None, (self.words, split_domain(prompt)[0])))


class ByDomain(Delegate):
    """A teacher for all domains that it knows but normals, for which another one answers.

    Args:
        teacher: answers for the other domains; the members of this teacher are its.
        normals: answers for normals; None is ``teacher``.
        words: words before the prompts about normals. "" is the word "normals" after them for a teacher that knows this
            domain, and no word for one that does not.

    Attributes:
        teacher, normals: the two.
        domains: see `sds3d.teachers.base.HasDomains`.

    Examples:
        >>> from sds3d.teachers import small
        >>> teacher = ByDomain(small.load(), normals=small.load(views="words"))
        >>> teacher.answerer("colours").views, teacher.answerer("normals").views
        ('camera', 'words')
    """

    def __init__(self, teacher: Teacher, normals: Teacher | None = None, words: str = ""):
        super().__init__(teacher)
        self.normals = teacher if normals is None else normals
        own, plain = answerer(self.normals, "normals"), words or "normals" not in domains_of(self.normals)
        self._normals = Worded(own, words) if plain else own
        self.domains = tuple(dict.fromkeys((*domains_of(teacher), "normals")))

    def answerer(self, domain: str) -> Teacher:
        """See `sds3d.teachers.base.HasAnswerers`."""
        return self._normals if domain == "normals" else answerer(self.teacher, domain)

    def check(self, prompt: str) -> None:
        """Raise ValueError if one of the two cannot read a prompt."""
        self.teacher.check(prompt)
        try:
            self._normals.check(prompt)
        except ValueError as error:
            raise ValueError(f"the teacher of normals: {error}") from error
