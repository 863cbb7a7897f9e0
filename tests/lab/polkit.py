"""The real polkitd on the lab's bus, with the lab's rules and actions in place of the machine's.

It runs in a mount name space of its own, where the lab's folders lie over those it reads: the
machine's are neither changed nor used.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.lab.bus import Bus
from tests.lab.deadline import LabError, wait_until
from tests.lab.process import Process, end, tail
from tests.lab.program import CHECKOUT, attempt
from tests.lab.run import Run

POLKITD = "/usr/lib/polkit-1/polkitd"
NAME = "org.freedesktop.PolicyKit1"
SYSTEM_ACTIONS = Path("/usr/share/polkit-1/actions")
COVER = """
mount --bind "$1/actions" /usr/share/polkit-1/actions
mount --bind "$1/etc-rules" /etc/polkit-1/rules.d
mount --bind "$1/share-rules" /usr/share/polkit-1/rules.d
exec "$2" --no-debug
"""
LAB_ACTION = "org.example.lab.generation"
LAB_POLICY = f"""<?xml version="1.0" encoding="UTF-8"?>
<policyconfig>
  <action id="{LAB_ACTION}">
    <description>Tells the lab which rules polkitd has read</description>
    <message>Not for people</message>
    <defaults><allow_any>no</allow_any></defaults>
  </action>
</policyconfig>
"""
# The rule stands first, so that no rule of a test answers in its place; what it compares with is
# set by the last line, so that rules which do not compile, or throw, are never taken for loaded.
RULES = """var labGeneration = 0;
polkit.addRule(function(action, subject) {
    if (action.id == "%(action)s")
        return action.lookup("n") == "" + labGeneration ? polkit.Result.YES : polkit.Result.NO;
});
%(rules)s
labGeneration = %(generation)d;
"""


def allow(user: str, *actions: str, result: str = "YES") -> str:
    """A rule that answers this (YES, NO, AUTH_ADMIN, …) to a user, for these actions."""
    return (
        "polkit.addRule(function(action, subject) {\n"
        f"    if (subject.user == {json.dumps(user)}"
        f" && {json.dumps(actions)}.indexOf(action.id) >= 0)\n"
        f"        return polkit.Result.{result};\n"
        "});\n"
    )


class Polkit:
    """polkitd, and the rules it goes by: none at first, so that the policy's defaults count."""

    def __init__(self, run: Run, bus: Bus) -> None:
        self._run = run
        self._bus = bus
        self._process: Process | None = None
        self._generation = 0
        self._folder = run.path("polkit")
        self.log = run.folder / "polkitd.log"
        for name in ("actions", "etc-rules", "share-rules"):
            (self._folder / name).mkdir()
        self.copy_actions()

    def copy_actions(self) -> None:
        """Lay out the project's policy files; polkitd sees changed ones by itself."""
        actions = self._folder / "actions"
        (actions / "org.example.lab.policy").write_text(LAB_POLICY)
        for source in (
            SYSTEM_ACTIONS / "org.freedesktop.policykit.policy",
            *sorted((CHECKOUT / "polkit").glob("*.policy")),
        ):
            if source.exists():
                shutil.copy(source, actions)

    def start(self) -> None:
        """Start it, and wait until it answers with the present rules."""
        apart = ("unshare", "--mount", "--propagation", "slave")
        argv = (*apart, "sh", "-e", "-c", COVER, "sh", self._folder, POLKITD)
        self._process = self._run.start("polkitd", argv, self.log, env=self._bus.env)
        wait_until("polkitd is on the bus", lambda: self._living() and self._bus.owned(NAME), 15)
        if not self._generation:
            self.rules("")
        else:
            self._wait()

    def stop(self) -> None:
        """Stop it: nobody answers for polkit then."""
        if self._process is not None:
            end(self._process)
            wait_until("polkitd is off the bus", lambda: not self._bus.owned(NAME), 5)
            self._process = None

    def rules(self, javascript: str) -> None:
        """Replace the rules, and wait until polkitd has taken them over."""
        self._generation += 1
        text = RULES % {
            "action": LAB_ACTION,
            "rules": javascript,
            "generation": self._generation,
        }
        new = self._folder / "etc-rules/.lab.new"
        new.write_text(text)
        new.replace(new.with_name("10-lab.rules"))
        if self._process is not None:
            self._wait()

    def _living(self) -> bool:
        if self._process is None or not self._process.alive():
            raise LabError(f"polkitd ended: {tail(self.log)}")
        return True

    def _wait(self) -> None:
        assert self._process is not None
        # The subject is polkitd itself, as root's processes get a yes without a look at the rules.
        question = ["pkcheck", "-a", LAB_ACTION, "-p", str(self._process.pid)]
        question += ["-d", "n", str(self._generation)]
        try:
            wait_until(
                "polkitd takes the rules",
                lambda: self._living() and not attempt(question, env=self._bus.env).returncode,
                5,
            )
        except LabError as error:
            raise LabError(f"{error}; polkitd says: {tail(self.log)}") from error
