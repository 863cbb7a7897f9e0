# Builds OpenZFS's modules for the kernel that is in the root folder $1, with all that this takes
# laid over it, and puts them there. Runs in mount and process name spaces that end with it.
folder=$1/../zfs
root=$1
mkdir -p "$folder/upper" "$folder/work" "$folder/all"
mount -t overlay -o "lowerdir=$root,upperdir=$folder/upper,workdir=$folder/work" all "$folder/all"
mount -t proc proc "$folder/all/proc"
mount --bind /dev "$folder/all/dev"
cp /etc/resolv.conf "$folder/all/etc/resolv.conf"
kernel=$(ls "$root/lib/modules")
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
chroot "$folder/all" apt-get -q update
# The headers are of the kernel's own version, and so is what they are built with.
chroot "$folder/all" apt-get -q install -y --no-install-recommends zfs-dkms "linux-headers-$kernel"
mkdir -p "$root/lib/modules/$kernel/extra"
for module in spl zfs; do
    built=$(find "$folder/all/lib/modules/$kernel/updates" -name "$module.ko*")
    case $built in
        *.xz) xz -dc "$built" > "$root/lib/modules/$kernel/extra/$module.ko" ;;
        *) cp "$built" "$root/lib/modules/$kernel/extra/" ;;
    esac
    strip --strip-debug "$root/lib/modules/$kernel/extra/$module.ko"
done
chroot "$root" depmod "$kernel"
