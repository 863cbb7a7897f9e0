"""Asks libvirt for the value of a secret; keeps none and shows none."""

from __future__ import annotations

import base64

import libvirt

from snapd_vm.errors import StorageFailed


def ceph_key(connection: libvirt.virConnect, uuid: str, usage: str) -> str:
    """The key in a secret of the usage type ceph, by its UUID or else its usage name, as base64.

    Raises StorageFailed where there is none, libvirt keeps it to itself (`private='yes'`), or the
    driver has no secrets at all (https://libvirt.org/hvsupport.html).
    """
    try:
        if uuid:
            secret = connection.secretLookupByUUIDString(uuid)
        else:
            secret = connection.secretLookupByUsage(libvirt.VIR_SECRET_USAGE_TYPE_CEPH, usage)
        value: bytes = secret.value()
    except libvirt.libvirtError as error:
        match error.get_error_code():
            case libvirt.VIR_ERR_NO_SECRET:
                problem = "has no value, or is not there; set it with 'virsh secret-set-value'"
            case libvirt.VIR_ERR_INVALID_SECRET:
                problem = "is private, so that nobody can ask for it; define it with private='no'"
            case libvirt.VIR_ERR_NO_SUPPORT:  # the test driver, for one
                problem = (
                    "can't be had, as this driver of libvirt keeps no secrets; name a ceph.conf "
                    "with a keyring in the disk's <config file=…/> instead"
                )
            case _:
                raise
        raise StorageFailed(f"The libvirt secret that the disk names {problem}.") from None
    return base64.b64encode(value).decode()
