"""Whether a domain is off in the way that a revert needs; changes nothing."""

from __future__ import annotations

from typing import Protocol

from snapd_vm.errors import InvalidState
from snapd_vm.model import Domain


class Hypervisor(Protocol):
    """What is needed of the hypervisor here."""

    def managed_save(self, uuid: str) -> bool: ...


def check_off(hypervisor: Hypervisor, domain: Domain) -> None:
    """Raise InvalidState where the domain runs, is paused, or would go on from a saved image."""
    if domain.active:
        raise InvalidState(f"The domain is {domain.state}; shut it down first, and revert then.")
    if hypervisor.managed_save(domain.uuid):
        raise InvalidState(
            "The domain has a managed save image, which would go on with the old disk; start it "
            "and shut it down, or remove the image with 'virsh managedsave-remove'."
        )
