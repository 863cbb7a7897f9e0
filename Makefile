# snapd-vm: what a person types. `make help` lists it.

SHELL     := /bin/bash
PYTHON    ?= python3
PREFIX    ?= /usr
DESTDIR   ?=
SYSCONFDIR ?= /etc
# The interpreter of the installed command: the system's, as it has Debian's python3-dbus-next,
# python3-libvirt, python3-lxml, python3-systemd and, for method btrfs, python3-btrfsutil.
INSTALL_PYTHON ?= /usr/bin/python3

# Tests start the daemon a thousand times; not to keep what Python compiles makes each start half as
# long again.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
RUN  := $(VENV)/bin/python -m

# Debian's packages, in this one place. To build and check; to run the lab, its guest and the tests; to
# make the host VM; and what `make bench` measures beside.
BUILD_PACKAGES := python3-venv python3-dev gcc libc6-dev pkg-config libvirt-dev libsystemd-dev man-db groff-base \
                  python3-btrfsutil
LAB_PACKAGES   := libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 \
                  qemu-utils qemu-guest-agent busybox-static cpio lz4 polkitd dbus systemd libglib2.0-bin \
                  e2fsprogs xfsprogs btrfs-progs ceph-mon ceph-osd ceph-mgr ceph-common \
                  qemu-block-extra libvirt-daemon-driver-storage-rbd
VM_PACKAGES    := mmdebstrap kmod
BENCH_PACKAGES := python3-dbus-next python3-libvirt python3-lxml python3-systemd \
                  libvirt-dbus snapper firewalld
PACKAGES       := $(BUILD_PACKAGES) $(LAB_PACKAGES)

.PHONY: help venv packages check test test-hostvm demo lab bench install uninstall clean
.DELETE_ON_ERROR:

help:
	@echo 'make check      lint, types, data files; under a minute'
	@echo 'make test       check, then all tests (as root, they start their own bus, libvirtd and guests)'
	@echo 'make test-hostvm  lvm, zfs and the service under systemd, in a VM: all of it, about three hours'
	@echo 'make demo       a quiesced snapshot of a running guest, over D-Bus, before your eyes'
	@echo 'make lab        the bus, libvirtd and guest of the tests, and a shell to try things in'
	@echo 'make bench      how long the guest stands still and a call takes, beside virsh and libvirt-dbus'
	@echo 'make install    DESTDIR= PREFIX=/usr: no network, no pip'
	@echo 'make uninstall  takes away what install put there'
	@echo 'make clean      takes away what was built here'

# Installs what is missing, as root; says what is missing, otherwise.
bench: PACKAGES += $(BENCH_PACKAGES)
packages:
	@missing=$$(printf '%s\n' $(PACKAGES) | sort -u | comm -23 - <( \
	    dpkg-query -W -f '$${db:Status-Status} $${Package}\n' $(PACKAGES) 2>/dev/null \
	    | sed -n 's/^installed //p' | sort -u)); \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" != 0 ]; then \
	    echo "These packages are missing; as root: apt-get install" $$missing >&2; exit 1; \
	fi; \
	echo "Installing" $$missing; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get -q update && apt-get -q install -y --no-install-recommends $$missing

venv: $(VENV)/.stamp

# libvirt-python must be of the version that libvirt's headers here are of. That of libbtrfsutil is
# Debian's own module, linked: the one for pip needs a newer library than Debian 12 has.
$(VENV)/.stamp: pyproject.toml | packages
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]' \
	    "libvirt-python==$$(pkg-config --modversion libvirt)"
	ln -sf /usr/lib/python3/dist-packages/btrfsutil.*.so $(VENV)/lib/python3.*/site-packages/
	@$(VENV)/bin/python -c 'import btrfsutil' || \
	    echo "python3-btrfsutil is not for this Python: method btrfs is missing, and its tests fail" >&2
	touch $@

check: $(VENV)/.stamp
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) pytest -q tests/test_files.py

# The host VM's image is built meanwhile, the first time. Of the tests with guests three run at a
# time, and the lab is patient with them; those that measure are alone.
test: PACKAGES += $(VM_PACKAGES)
test: $(VENV)/.stamp packages
	@status=0; set -x; \
	$(RUN) tests.lab vm-image & image=$$!; \
	$(MAKE) --no-print-directory check || { kill $$image; exit 1; }; \
	$(RUN) pytest tests --ignore=tests/real --ignore=tests/hostvm -m 'not measures' \
	    || status=1; \
	SNAPD_VM_LAB_SLOWNESS=3 $(RUN) pytest tests/real -m 'not measures' \
	    -n 3 --dist loadfile --no-loadscope-reorder || status=1; \
	wait $$image || status=1; \
	$(RUN) pytest tests --ignore=tests/hostvm -m measures || status=1; \
	$(RUN) pytest tests/hostvm -m 'not thorough' || status=1; \
	exit $$status

# All of what is in a VM with systemd, LVM and ZFS, which takes both processors for about three hours.
test-hostvm: PACKAGES += $(VM_PACKAGES)
test-hostvm: check packages
	SNAPD_VM_ALL=1 $(RUN) pytest tests/hostvm

demo: $(VENV)/.stamp packages
	$(RUN) tests.lab.demo

lab: $(VENV)/.stamp packages
	$(RUN) tests.lab up

bench: $(VENV)/.stamp packages
	$(RUN) tests.bench

# Where things go. The daemon's unit and the launcher name PREFIX; all else is as it is here.
BINDIR   := $(PREFIX)/bin
LIBDIR   := $(PREFIX)/lib/snapd-vm
UNITDIR  := $(PREFIX)/lib/systemd/system
SHARE    := $(PREFIX)/share
DOCDIR   := $(SHARE)/doc/snapd-vm
INSTALLED := \
    $(BINDIR)/snapd-vm \
    $(UNITDIR)/snapd-vm.service \
    $(SHARE)/dbus-1/system.d/org.example.DiskSnapshot.conf \
    $(SHARE)/dbus-1/system-services/org.example.DiskSnapshot.service \
    $(SHARE)/dbus-1/interfaces/org.example.DiskSnapshot.xml \
    $(SHARE)/polkit-1/actions/org.example.DiskSnapshot.policy \
    $(SHARE)/snapd-vm/diskSnapshot.rng \
    $(SHARE)/snapd-vm/executable-method.schema.json \
    $(SHARE)/bash-completion/completions/snapd-vm \
    $(SHARE)/man/man1/snapd-vm.1 \
    $(SHARE)/man/man5/snapd-vm.toml.5 \
    $(DOCDIR)/README.md \
    $(DOCDIR)/CHANGELOG.md \
    $(DOCDIR)/LICENSE \
    $(DOCDIR)/methods.md \
    $(DOCDIR)/writing-a-method.md \
    $(DOCDIR)/example-array/rbd-array \
    $(DOCDIR)/example-method/README.md \
    $(DOCDIR)/example-method/pyproject.toml \
    $(DOCDIR)/example-method/snapd_vm_copy.py \
    $(DOCDIR)/examples/snapd-vm.toml \
    $(DOCDIR)/examples/50-snapd-vm-backup-operators.rules
# The data folder of the package is a link to data/ here; installed, it holds the files themselves.
MODULES := $(shell cd snapd_vm && find . -name '*.py' | sort)
PACKAGE_DATA := $(notdir $(wildcard data/*.xml data/*.rng data/*.json))

install:
	@test -n "$(MODULES)"
	rm -rf $(DESTDIR)$(LIBDIR)
	for module in $(MODULES); do \
	    install -D -m 644 snapd_vm/$$module $(DESTDIR)$(LIBDIR)/snapd_vm/$$module || exit 1; \
	done
	install -d $(DESTDIR)$(LIBDIR)/snapd_vm/data
	install -m 644 $(addprefix data/,$(PACKAGE_DATA)) $(DESTDIR)$(LIBDIR)/snapd_vm/data
	@# Compiled now: at start the daemon could not write there.
	umask 022; $(INSTALL_PYTHON) -I -m compileall -q -d $(LIBDIR) $(DESTDIR)$(LIBDIR)
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(UNITDIR)
	sed 's|^#!.*|#!$(INSTALL_PYTHON) -I|' data/snapd-vm.launcher > $(DESTDIR)$(BINDIR)/snapd-vm
	chmod 755 $(DESTDIR)$(BINDIR)/snapd-vm
	sed 's|=/usr/bin/snapd-vm|=$(BINDIR)/snapd-vm|' systemd/snapd-vm.service \
	    > $(DESTDIR)$(UNITDIR)/snapd-vm.service
	chmod 644 $(DESTDIR)$(UNITDIR)/snapd-vm.service
	install -d $(DESTDIR)$(SYSCONFDIR)/snapd-vm
	install -D -m 644 -t $(DESTDIR)$(SHARE)/dbus-1/system.d data/org.example.DiskSnapshot.conf
	install -D -m 644 -t $(DESTDIR)$(SHARE)/dbus-1/system-services data/org.example.DiskSnapshot.service
	install -D -m 644 -t $(DESTDIR)$(SHARE)/dbus-1/interfaces data/org.example.DiskSnapshot.xml
	install -D -m 644 -t $(DESTDIR)$(SHARE)/polkit-1/actions polkit/org.example.DiskSnapshot.policy
	install -D -m 644 -t $(DESTDIR)$(SHARE)/snapd-vm data/diskSnapshot.rng \
	    data/executable-method.schema.json
	install -D -m 644 data/snapd-vm.bash $(DESTDIR)$(SHARE)/bash-completion/completions/snapd-vm
	install -D -m 644 -t $(DESTDIR)$(SHARE)/man/man1 docs/snapd-vm.1
	install -D -m 644 -t $(DESTDIR)$(SHARE)/man/man5 docs/snapd-vm.toml.5
	install -D -m 644 -t $(DESTDIR)$(DOCDIR) README.md CHANGELOG.md LICENSE docs/methods.md \
	    docs/writing-a-method.md
	install -D -m 755 -t $(DESTDIR)$(DOCDIR)/example-array docs/example-array/rbd-array
	install -D -m 644 -t $(DESTDIR)$(DOCDIR)/example-method docs/example-method/README.md \
	    docs/example-method/pyproject.toml docs/example-method/snapd_vm_copy.py
	install -D -m 644 -t $(DESTDIR)$(DOCDIR)/examples data/snapd-vm.toml \
	    polkit/50-snapd-vm-backup-operators.rules

uninstall:
	rm -rf $(DESTDIR)$(LIBDIR)
	rm -f $(addprefix $(DESTDIR),$(INSTALLED))
	rmdir --ignore-fail-on-non-empty $(wildcard $(addprefix $(DESTDIR),$(DOCDIR)/examples $(DOCDIR)/example-array \
	    $(DOCDIR)/example-method $(DOCDIR) \
	    $(SHARE)/snapd-vm $(SYSCONFDIR)/snapd-vm)) 2>/dev/null || true

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find snapd_vm tests -name __pycache__ -type d -exec rm -rf {} +
