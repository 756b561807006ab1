"""Hessians of many logistic regressions on the same rows: products, preconditioners, and how far a gradient says the optimum is.

Parameters are [J, d + 1], the weights and, last, the bias of each contrast, for rows about their mean; `contrasts` [K, J] makes the
logits of K outputs of them. A product with a Hessian takes two with the rows, in single precision. The preconditioner is the
Hessian that all samples would give if their probabilities were the same, which is diagonal in the rows' principal axes; where that
is too far from the truth, the inverse of the Hessian at some point before, by Cholesky.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor
from torch.nn import functional

from exactivations.lit_modules.probes.centred_rows import CentredRows

PARAMETERS_PER_PRODUCT = 20  # a Hessian is made and inverted in the time of one product with it for so many parameters
ROWS_PER_PARAMETER = 64  # that an inverted Hessian is made of: more cost more than they tell
LARGEST_ROOTS = 1 << 26  # numbers, of all problems; where they were more, products must do
MOST_PRODUCTS = 1000  # of a step where they must
JITTER = 1e-5  # of a scaled Hessian's mean diagonal: more than what single precision rounds
NEGLIGIBLE = 1e-6  # weights that can move no logit by more are nought: there is nothing that their error is relative to


@dataclass(frozen=True, kw_only=True)
class LogisticHessian:
    """Hessians of A problems, each at its point.

    Attributes:
        rows: The rows of all problems.
        share: Weight of each sample, of sum 1 in each problem.
        penalty: Of the weights; 0 for the bias.
        contrasts: Of one output 1, of more an orthonormal basis of what does not move all of them alike.
        probabilities: Of each output.
        roots: R, where R' R was about the inverse of the Hessian at a point before; None to go by the principal axes.
    """

    rows: CentredRows
    share: Float32[Tensor, "a 1 n"]
    penalty: Float32[Tensor, "a 1 width"]
    contrasts: Float32[Tensor, "k j"]
    probabilities: Float32[Tensor, "a k n"]
    roots: Float32[Tensor, "a p p"] | None = None

    def keep(self, which: Bool[Tensor, " a"]) -> "LogisticHessian":
        """Returns those of some of the problems."""
        values = {name: getattr(self, name) for name in ("share", "penalty", "probabilities", "roots")}
        return replace(self, **{name: value[which] for name, value in values.items() if value is not None})

    def at(self, state: Float32[Tensor, "a k n"]) -> "LogisticHessian":
        """Returns those at other points, with these probabilities, preconditioned by the same roots (if there are any)."""
        return replace(self, probabilities=state)

    def times(self, vectors: Float32[Tensor, "a j width"]) -> Float32[Tensor, "a j width"]:
        """Returns each Hessian times its vector."""
        product = vectors * self.penalty
        for piece, block in self.rows.blocks(torch.float32):
            if len(self.contrasts) == 1:
                product += functional.linear(vectors, block).mul_(self._curvature[..., piece]) @ block
            else:
                p, moved = self.probabilities[..., piece], functional.linear(self.contrasts @ vectors, block)
                moved = moved.mul_(self.share[..., piece]).mul_(p)
                product += self.contrasts.mT @ (moved.addcmul_(p, moved.sum(dim=1, keepdim=True), value=-1) @ block)
        return product

    def precondition(self, vectors: Float32[Tensor, "a j width"]) -> Float32[Tensor, "a j width"]:
        """Returns each vector times roughly the inverse of its Hessian."""
        if self.roots is None:
            return functional.linear((vectors @ self.rows.axes) * self._inverse, self.rows.axes)
        return (self.roots.mT @ (self.roots @ vectors.flatten(1)[..., None])).view_as(vectors)

    @property
    def price(self) -> int:
        """How many products with the Hessians cost as much as `improved`."""
        size = self.contrasts.shape[1] * self.rows.width
        return max(3, size // PARAMETERS_PER_PRODUCT) if len(self.share) * size**2 <= LARGEST_ROOTS else MOST_PRODUCTS

    def improved(self) -> "LogisticHessian":
        """Returns them with roots of their own."""
        n_problems, j, width = len(self.share), self.contrasts.shape[1], self.rows.width
        size = j * width
        which, rows = self.rows.sample(ROWS_PER_PARAMETER * size)
        share = self.share[:, 0, which] / self.share[:, 0, which].sum(dim=1, keepdim=True).clamp(min=1e-30)
        p, scale = self.probabilities[..., which], self._inverse.sqrt()
        mean = self.contrasts.mT @ p
        hessian, back = p.new_zeros(2, n_problems, j, width, j, width)
        for a in range(j):
            back[:, a, :, a] = scale.mT * self.rows.axes.mT
            for b in range(a + 1):
                between = ((self.contrasts[:, a] * self.contrasts[:, b]) @ p - mean[:, a] * mean[:, b]) * share
                block = torch.stack([(rows.mT * one) @ rows for one in between]) * scale * scale.mT
                if a == b:
                    block.diagonal(dim1=1, dim2=2).add_((self.penalty * scale**2)[:, 0])
                hessian[:, a, :, b] = hessian[:, b, :, a] = block
        hessian, back = hessian.view(n_problems, size, size), back.view(n_problems, size, size)
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        diagonal += JITTER * diagonal.mean(dim=1, keepdim=True)
        factors, failed = torch.linalg.cholesky_ex(hessian)
        factors[failed > 0] = torch.eye(size, device=factors.device)  # which leaves the scale: equal probabilities again
        return replace(self, roots=torch.linalg.solve_triangular(factors, back, upper=False))

    def error(self, parameters: Float64[Tensor, "a j width"], gradient: Float64[Tensor, "a j width"]) -> Float64[Tensor, " a"]:
        """Returns a bound of the relative error of the weights (or how far a Newton step would move the biases, if that is more).

        With the biases at their best, the loss is as strongly convex in the weights as its penalty, so that the norm of its
        gradient over the penalty bounds the distance. From biases with gradient b and Hessian B to their best, the gradient of the
        weights changes by at most the longest row x sqrt(b' B^-1 b / 2): by Cauchy and Schwarz, as no eigenvalue of a softmax's
        Hessian is above 1/2. (B is taken where the biases are, which is within `tolerance` of their best at the end.)
        """
        norm = torch.linalg.vector_norm
        of_biases = gradient[..., -1:]
        step = torch.linalg.solve(self._of_biases, of_biases)
        change = self.rows.radius * ((of_biases * step).sum(dim=(1, 2)) / 2).clamp(min=0).sqrt()
        least = max(NEGLIGIBLE / self.rows.radius, 1e-300) if self.rows.radius else 1.0
        weights = norm(parameters[..., :-1], dim=(1, 2)).clamp(min=least)
        bound: Tensor = (norm(gradient[..., :-1], dim=(1, 2)) + change) / (self.penalty[:, 0, 0] * weights)
        return bound.maximum(norm(step, dim=(1, 2)))

    @cached_property
    def _curvature(self) -> Tensor:
        """Of the samples of problems with one output."""
        return self.share * self.probabilities * (1 - self.probabilities)

    @cached_property
    def _of_biases(self) -> Tensor:
        """The Hessians of the biases, float64 [A, J, J]."""
        if len(self.contrasts) == 1:
            of_biases = self._curvature.sum(dim=2, keepdim=True)
        else:
            shared = self.share * self.probabilities
            of_outputs = torch.diag_embed(shared.sum(dim=2)) - shared @ self.probabilities.mT
            of_biases = self.contrasts.mT @ of_outputs @ self.contrasts
        of_biases.diagonal(dim1=1, dim2=2).add_(1e-12)  # where no sample is in doubt, rounding leaves none
        return of_biases.double()

    @cached_property
    def _inverse(self) -> Tensor:
        """One over the diagonal in the principal axes, were all samples' probabilities the same, float32 [A, 1, width]."""
        level = self._of_biases.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None].float()
        # Where no sample is in doubt, rounding leaves no level at all, and the bias would have no curvature.
        return 1 / (level.clamp(min=1e-6) * self.rows.variance + self.penalty)
