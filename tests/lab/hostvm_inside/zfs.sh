# Builds OpenZFS's modules for the kernel that is in the root folder $1, into $2/modules, with all that
# this takes laid over that root. Runs in mount and process name spaces that end with it.
root=$1
folder=$2
all=$folder/all
mkdir -p "$folder/upper" "$folder/work" "$all" "$folder/modules"
mount -t overlay -o "lowerdir=$root,upperdir=$folder/upper,workdir=$folder/work" all "$all"
mount -t proc proc "$all/proc"
mount --bind /dev "$all/dev"
cp /etc/resolv.conf "$all/etc/resolv.conf"
kernel=$(ls "$root/lib/modules")
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
chroot "$all" apt-get -q update
# The headers are of the kernel's own version, and so is what they are built with.
chroot "$all" apt-get -q install -y --no-install-recommends zfs-dkms "linux-headers-$kernel"
find "$all/lib/modules/$kernel/updates" -name '*.ko' -exec cp '{}' "$folder/modules/" ';'
test -e "$folder/modules/zfs.ko"
strip --strip-debug "$folder/modules/"*.ko
