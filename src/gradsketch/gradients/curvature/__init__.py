"""Second-order information about a mean loss, as self-adjoint maps that are never stored."""

from gradsketch.gradients.curvature.base import Mode
from gradsketch.gradients.curvature.gradient import loss_gradient
from gradsketch.gradients.curvature.loss_hessian import hessian
from gradsketch.gradients.curvature.outer_products import fisher, gauss_newton

__all__ = ["Mode", "fisher", "gauss_newton", "hessian", "loss_gradient"]
