"""An analysis as a page: the two curves, the candidates, and what each number does and doesn't say."""

from __future__ import annotations

from shoal_lab.quality.analysis import Analysis
from shoal_lab.quality.losses import Estimate
from shoal_lab.report.page import Heading, Paragraph, Part, Plot, Table, render
from shoal_lab.report.plots import Line, line_plot


def importance_plot(analysis: Analysis) -> str:
    """SVG of both curves over the layers, with bands of one standard error."""
    layers, length = range(analysis.num_layers), analysis.response_tokens
    curves = {"decode": analysis.importance.decode, "prefill": analysis.importance.prefill}
    lines = [
        Line(label, layers, [mean / length for mean in curve.mean], [error / length for error in curve.standard_error])
        for label, curve in curves.items()
    ]
    return line_plot(lines, x_label="layer", y_label="importance (nats a response token)", logarithmic=True)


def render_analysis(analysis: Analysis) -> str:
    """One self-contained HTML page."""
    settings = analysis.settings
    parts: list[Part] = [
        Paragraph(_summary(analysis)),
        Heading("How much each layer matters"),
        Plot(
            importance_plot(analysis),
            "One virtual gate a layer and stage multiplies what the layer adds to the residual. Importance is the mean "
            f"over {analysis.num_samples} responses, drawn from the model itself, of the squared derivative of their "
            "negative log-likelihood, divided by the mean length of a response; bands are one standard error. The last "
            "layer's work on the prompt can't reach the answer, its importance is exactly 0, and the axis leaves it "
            "out.",
        ),
        Paragraph(
            f"In the last third of the layers, the work on the answer matters {analysis.contrast:.3g} times as much as "
            "the work on the prompt."
        ),
        Heading("What skipping costs"),
        _candidates(analysis),
        Paragraph(
            "Predicted: half the sum of the prefill importance of the skipped layers. It is the second-order estimate, "
            "around the whole model, of setting these gates to 0 for all prompt tokens but the last, each layer as if "
            "it were skipped alone. With the gates at 0 a prompt token's state stays as it left the last kept layer, "
            "so this is the shallow plan, with the paper's projection of K/V and without calibration. A gate that "
            "closes is no small step: the estimate tells the order of things, not the figure."
        ),
        Paragraph(
            f"Measured: {analysis.num_held_out} responses to prompts that the gates haven't seen, as the model gives "
            "them at full depth, read again by the shallow plan. Divergence is the mean Kullback-Leibler divergence of "
            "the next-token distributions from full depth; extra loss is how much less likely the response itself "
            "becomes. Both have the same expectation, and the divergence has the smaller error. Skipping one layer "
            "loses nothing: the K/V of the first skipped layer are the true ones."
        ),
        Heading("How this was made"),
        Table(
            ("", ""),
            [
                ("model", settings.model),
                ("model digest", settings.model_digest),
                ("digest of the prompts", settings.data),
                ("seed", str(settings.seed)),
                ("computed in", settings.dtype),
                ("tokens of a response, at most", str(settings.response_tokens)),
                ("tokens of a response, mean", f"{analysis.response_tokens:.1f}"),
            ],
        ),
        Paragraph("Standard errors take responses as independent, though several share a prompt."),
    ]
    return render(f"Layer importance of {settings.model}", parts)


def _summary(analysis: Analysis) -> str:
    limit = f"{analysis.max_loss:g} nats a token"
    count = analysis.recommended_skip_layers
    if not count:
        return f"None of the candidates stays within {limit} of divergence from full depth."
    return (
        f"Recommended: skip the last {count} of {analysis.num_layers} layers for prompts. It is the most of the "
        f"candidates below that diverges from full depth by no more than {limit}."
    )


def _candidates(analysis: Analysis) -> Table:
    counts = [found.num_skipped for found in analysis.candidates]
    best = analysis.recommended_skip_layers
    return Table(
        ("skipped layers", "predicted", "divergence", "extra loss"),
        [
            (
                str(found.num_skipped),
                f"{found.predicted_loss:.4f}",
                _written(found.measured.divergence),
                _written(found.measured.extra),
            )
            for found in analysis.candidates
        ],
        caption="Nats a response token, measured ones with their standard error.",
        marked=counts.index(best) if best in counts else None,
    )


def _written(estimate: Estimate) -> str:
    return f"{estimate.mean:.4f} ± {estimate.standard_error:.4f}"
