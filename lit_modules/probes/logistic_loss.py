"""The loss of many logistic regressions on the same rows, and its gradients, in double precision.

A problem is a variant of the labels with a strength of regularisation; problem v * S + s is variant v with strength s. Its
parameters are [J, d + 1]: weights and, last, the bias, for rows about their mean. Two classes have one output, the logit of the
second, and J = 1. K > 2 have K outputs, and J = K - 1 contrasts between them: what moves all logits alike changes no probability.
"""

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn import functional

from exactivations.lit_modules.probes.centred_rows import CentredRows
from exactivations.lit_modules.probes.logistic_hessian import LogisticHessian

BLOCK = 1 << 19  # numbers, of rows and their logits, at a time: they stay in the cache


class LogisticLoss:
    """Mean cross-entropy, by the samples' shares, + l2 / 2 x the weights' squared norm, of V variants of labels x S strengths.

    Args:
        rows: Training rows, float32 or float64, finite.
        labels: Class numbers of each variant.
        n_classes: See above.
        share: Weight of each sample, of sum 1 in each variant.
        l2: Penalty of each variant and strength.
    """

    def __init__(
        self,
        rows: Float[Tensor, "n d"],
        labels: Int64[Tensor, "v n"],
        n_classes: int,
        share: Float64[Tensor, "v n"],
        l2: Float64[Tensor, "v s"],
    ) -> None:
        k = 1 if n_classes == 2 else n_classes
        even = torch.eye(k, dtype=torch.float64, device=rows.device)
        self.contrasts = even if k == 1 else torch.linalg.qr(even[:, 1:] - 1 / k)[0]  # [K, J], orthonormal, of sum 0
        # One mean and one set of axes serve all variants: they decide how many steps it takes, and not where it ends.
        self.rows = CentredRows(rows, share.mean(dim=0), max(1, BLOCK // (rows.shape[1] + l2.numel() * k)))
        self._penalty = l2.flatten()[:, None, None].repeat(1, 1, self.rows.width)
        self._penalty[..., -1] = 0
        self._labels, self._share = labels, share
        self._variant = torch.arange(l2.numel(), device=rows.device) // l2.shape[1]

    def evaluate(
        self, parameters: Float64[Tensor, "a j width"], problems: Int64[Tensor, " a"]
    ) -> tuple[Float64[Tensor, " a"], Float64[Tensor, "a j width"], Float32[Tensor, "a k n"]]:
        """Returns values and gradients of some of the problems, and the probabilities of the outputs."""
        variant = self._variant[problems]
        outputs = self.contrasts @ parameters
        probabilities = torch.empty(*outputs.shape[:2], len(self.rows), device=parameters.device)
        gradient = parameters * self._penalty[problems]
        value = (gradient * parameters).sum(dim=(1, 2)) / 2
        for piece, block in self.rows.blocks(torch.float64):
            logits = functional.linear(outputs, block)
            labels, share = self._labels[:, None, piece][variant], self._share[:, None, piece][variant]
            if outputs.shape[1] == 1:
                loss = -functional.logsigmoid(torch.where(labels > 0, logits, -logits))
                p = torch.sigmoid(logits)
                residual = p - labels
                probabilities[..., piece] = p
            else:
                log_p = torch.log_softmax(logits, dim=1)
                loss = -log_p.gather(1, labels)
                residual = log_p.exp_()
                probabilities[..., piece] = residual
                residual.scatter_add_(1, labels, -torch.ones_like(loss))
            value += (loss * share).sum(dim=(1, 2))
            gradient += self.contrasts.mT @ ((residual * share) @ block)
        return value, gradient, probabilities

    def hessians(self, state: Float32[Tensor, "p k n"]) -> LogisticHessian:
        """Returns the Hessians of all problems at the points with these probabilities."""
        share = self._share[self._variant][:, None].float()
        penalty, contrasts = self._penalty.float(), self.contrasts.float()
        return LogisticHessian(rows=self.rows, share=share, penalty=penalty, contrasts=contrasts, probabilities=state)
