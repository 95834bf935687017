"""UnifiedReward and VQAScore as configurations of :class:`rewards.judges.judge.VLMJudge`: a template and its readout.

Calls, retries, failures and label probabilities are the judge's. The rubrics are this library's own words, and the
judged image comes last, so that the samples of a prompt share what is before it: numbers are not comparable with
published ones, and the hash of the text in the fingerprint says which text was asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewards.judges.settings import JudgeSettings
from rewards.judges.templates import Template, parse_template

if TYPE_CHECKING:
    from rewards.judges.client import JudgeClient
    from rewards.judges.judge import VLMJudge

_VQA_SCORE = """readout: yes_no
labels: Yes No
---
Does this figure show "{prompt}"? Please answer Yes or No.

{image}"""

_UNIFIED_SCORE = """readout: digits
labels: 1 2 3 4 5
---
You grade a picture that was generated from a caption, by two things together. Alignment: are all things of the caption
there, with the right numbers, properties, relations and actions? Quality: is it sharp, coherent and pleasing, without
distorted bodies, artifacts or unreadable text?

1 - unrelated to the caption, or broken.
2 - much of the caption is missing, or the picture is poor.
3 - the caption is met in part, or the picture has clear defects.
4 - the caption is met but for small things, and the picture is good.
5 - the caption is met fully, and the picture is excellent.

Answer with the final score as a single number, and nothing else.

Caption: {prompt}

Picture: {image}"""

_UNIFIED_DIMENSIONS = """readout: rubric
dimensions: alignment 1-5, coherence 1-5, style 1-5
rule: mean
---
You grade a picture that was generated from a caption on three scales from 1 (very poor) to 5 (excellent).

alignment: does the picture show what the caption says, word for word: objects, numbers, properties, relations?
coherence: is the picture possible in itself, without distorted, merged or missing parts?
style: is it pleasing to look at: composition, light, colour, detail, and the style that the caption asks for?

Judge each scale for itself: a beautiful picture of something else has a low alignment and a high style.

Answer with JSON: {"reasoning": "two sentences", "alignment": n, "coherence": n, "style": n}

Caption: {prompt}

Picture: {image}"""


def vqa_score_template() -> Template:
    """VQAScore's question."""
    return parse_template(_VQA_SCORE, "vqa_score.v1")


def unified_score_template() -> Template:
    """One score from 1 to 5 for alignment and quality, read off the label probabilities."""
    return parse_template(_UNIFIED_SCORE, "unified_score.v1")


def unified_dimensions_template() -> Template:
    """Alignment, coherence and style from 1 to 5, as JSON."""
    return parse_template(_UNIFIED_DIMENSIONS, "unified_dimensions.v1")


def vqa_score(client: JudgeClient, model: str, settings: JudgeSettings | None = None) -> VLMJudge:
    """VQAScore, a reward in [0, 1]: P(Yes) / (P(Yes) + P(No)) to 'Does this figure show "..."?'.

    Lin et al., arXiv:2404.01291; the published judges are CLIP-FlanT5, GPT-4o and others.

    Differs: the published score is P(Yes) over the whole vocabulary, which is this times the component ``label_mass``,
    and the image comes before the question.
    """
    return _judge(client, model, vqa_score_template(), settings)


def unified_score(client: JudgeClient, model: str, settings: JudgeSettings | None = None) -> VLMJudge:
    """A UnifiedReward-style pointwise score, in [0.2, 1]: sum_k p_k k / 5 over the digits 1 to 5.

    Wang et al., UnifiedReward, arXiv:2503.05236; rewards from 1 to 5 divided by 5, as Flow-GRPO has them.

    Differs: the published model writes "Final Score: k", which is sampled; here the expected digit is read, for any
    judge. UnifiedReward's own weights were trained to write that sentence: for them take :func:`unified_dimensions`,
    whose schema the server enforces, or the label mass is too low and nothing is available.
    """
    return _judge(client, model, unified_score_template(), settings)


def unified_dimensions(client: JudgeClient, model: str, settings: JudgeSettings | None = None) -> VLMJudge:
    """A UnifiedReward-style rubric, in [0, 1]: the mean of alignment, coherence and style, scaled by (s - 1) / 4.

    Wang et al., UnifiedReward, arXiv:2503.05236. Components: the three dimensions, unscaled.

    Differs: published tables have the scores from 1 to 5, and numbers with decimals; whole numbers are asked for here.
    """
    return _judge(client, model, unified_dimensions_template(), settings)


def _judge(client: JudgeClient, model: str, template: Template, settings: JudgeSettings | None) -> VLMJudge:
    from rewards.judges.judge import VLMJudge

    return VLMJudge(client, model, template, settings)
