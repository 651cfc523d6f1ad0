"""Second-order information about a mean loss, as self-adjoint maps that are never stored."""

from gradsketch.gradients.curvature.base import Mode
from gradsketch.gradients.curvature.gauss_newton import fisher, gauss_newton
from gradsketch.gradients.curvature.hessian import hessian, loss_gradient

__all__ = ["Mode", "fisher", "gauss_newton", "hessian", "loss_gradient"]
