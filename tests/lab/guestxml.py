"""The `<domain>` of a lab guest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from tests.lab.disks import Disk
from tests.lab.image import GuestImage

Agent = Literal["libvirt", "socket", "none"]
LIBVIRT_AGENT = "org.qemu.guest_agent.0"
SOCKET_AGENT = "org.example.guest_agent.0"
CONTROL = "org.example.lab.0"
PULSE = "org.example.lab.pulse.0"
# quiet and what follows it save half a second of boot under TCG
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 nokaslr tsc=reliable no_timer_check cryptomgr.notests"
)


@dataclass(frozen=True)
class Ports:
    """Where the host's ends of a guest's serial ports are."""

    control: Path
    pulse: Path
    agent: Path
    console: Path


def ports_in(folder: Path, name: str) -> Ports:
    """The ports of a guest; a socket's path must stay under 108 bytes."""
    return Ports(
        control=folder / f"{name}.control",
        pulse=folder / f"{name}.pulse",
        agent=folder / f"{name}.agent",
        console=folder / f"{name}.console.log",
    )


def domain_xml(
    name: str,
    uuid: str,
    disks: Sequence[Disk],
    image: GuestImage,
    ports: Ports,
    agent: Agent,
    *,
    kernel_arguments: str = "",
    memory_mib: int = 160,
    devices: str = "",
    elements: str = "",
) -> str:
    """A domain for TCG: /dev/kvm may be there and still not run an ordinary kernel."""
    return f"""<domain type='qemu'>
  <name>{escape(name)}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{escape(str(image.kernel))}</kernel>
    <initrd>{escape(str(image.initramfs))}</initrd>
    <cmdline>{escape(f"{KERNEL_ARGUMENTS} {kernel_arguments}".strip())}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  {elements}
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {"".join(disk.xml for disk in disks)}
    <controller type='usb' model='none'/>
    <controller type='virtio-serial'/>
    <serial type='file'><source path={quoteattr(str(ports.console))}/></serial>
    {_channel(CONTROL, ports.control)}
    {_channel(PULSE, ports.pulse)}
    {_agent_channel(agent, ports)}
    <memballoon model='none'/>
    {devices}
  </devices>
</domain>
"""


def _channel(name: str, path: Path) -> str:
    return (
        f"<channel type='unix'><source mode='bind' path={quoteattr(str(path))}/>"
        f"<target type='virtio' name='{name}'/></channel>"
    )


def _agent_channel(agent: Agent, ports: Ports) -> str:
    if agent == "libvirt":  # no path: libvirt makes one, and speaks on it
        return f"<channel type='unix'><target type='virtio' name='{LIBVIRT_AGENT}'/></channel>"
    if agent == "socket":
        return _channel(SOCKET_AGENT, ports.agent)
    return ""
