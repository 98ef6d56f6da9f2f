//! A Debian that is frozen in the middle of fio, iperf3 and a TCP stream, and ten copies of a guest
//! in the middle of fio.

use std::fs::{File, read_to_string};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::common::disk::{MIB, md5};
use crate::common::files::debian;
use crate::common::freezing::*;
use crate::common::net::{Tap, send};
use crate::common::programs::Programs;
use crate::common::{POWERED_OFF, Rvmm, Shell, Vm, measured};

/// Time between two looks at something that does not tell that it changes.
const POLL: Duration = Duration::from_millis(20);
/// The time limit of such a wait, and for a guest under load.
const PATIENCE: Duration = Duration::from_secs(400);

/// Time between two MiB of a stream.
const BETWEEN: Duration = Duration::from_millis(400);

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        thread::sleep(POLL);
    }
}

/// A new image without content.
fn empty_image(freezer: &Freezer, mib: usize) -> PathBuf {
    let image = freezer.scratch.file("data", []);
    let file = File::options().write(true).open(&image);
    let file = file.expect("the image");
    file.set_len((mib * MIB) as u64).expect("its size");
    image
}

/// Waits until so much of an image that was empty is written.
fn wait_for_writes(image: &Path, mib: usize) {
    wait_until("writes", || {
        let written = image.metadata().expect("the image").blocks() * 512;
        written >= (mib * MIB) as u64
    });
}

/// Four jobs of fio, each with so many MiB of its own, which read everything back at the end.
fn fio(disk: &str, mib: usize) -> String {
    format!(
        "fio --name=mix --filename={disk} --direct=1 --rw=randwrite \
         --bssplit=512/10:4k/40:16k/30:64k/20 --size={mib}M --offset_increment={mib}M --numjobs=4 \
         --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --verify_state_save=0 \
         --fsync=64 --group_reporting"
    )
}

/// A Debian with a shell of root at its console.
struct Debian {
    vm: Vm,
    /// How often it has shown its counter.
    counts: usize,
}

impl Debian {
    fn of(vm: Vm) -> Self {
        Self { vm, counts: 0 }
    }

    /// The counter, which the guest increments in /run/count.
    fn count(&mut self) -> u64 {
        const IS: &str = " is the count\r";
        self.counts += 1;
        self.vm
            .send("until read n </run/count; do :; done; echo \"$n is the count\"\n");
        self.vm.wait_for_times(IS, self.counts);
        let console = self.vm.console();
        let before = console.rsplit_once(IS).expect("the count").0;
        // The shell writes escapes before it.
        let count = before.rsplit(|c: char| !c.is_ascii_digit()).next();
        count.expect("a part").parse().expect("a number")
    }

    /// Waits for the end of a load, which must be successful.
    fn ended(&mut self, name: &str) {
        let end = format!(" of {name}\r");
        self.vm.wait_for(&end);
        if !self.vm.console().contains(&format!("status 0{end}")) {
            // The failed case shows the console.
            self.vm
                .send(format!("cat /run/{name}; echo \"$((1 + 1)) shown\"\n"));
            self.vm.wait_for("2 shown");
            panic!("{name} failed");
        }
    }
}

/// A process, which is killed if a case fails.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the host does on the network for a guest: a server of iperf3, and a stream that the guest
/// sums up.
struct Partner {
    server: Server,
    port: u16,
    stream: JoinHandle<String>,
    is_over: Arc<AtomicBool>,
}

impl Partner {
    fn start(programs: &Programs, tap: &Tap) -> Self {
        let mut server = programs.command("iperf3");
        // Each case has its own address.
        server.args(["--server", "--one-off", "--bind", &tap.address(1)]);
        let server = Server(server.stdout(Stdio::null()).spawn().expect("iperf3"));
        let listener = TcpListener::bind((tap.address(1), 0)).expect("listen");
        let port = listener.local_addr().expect("its address").port();
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        // Slow enough to leave the guest time for its disk.
        let goes_on = move |_| {
            thread::sleep(BETWEEN);
            !over.load(Ordering::Acquire)
        };
        let stream = thread::spawn(move || send(&listener, goes_on));
        Self {
            server,
            port,
            stream,
            is_over,
        }
    }

    /// Ends the stream, and returns its sum.
    fn sum(mut self) -> String {
        self.is_over.store(true, Ordering::Release);
        let sum = self.stream.join().expect("the sender");
        let status = self.server.0.wait().expect("iperf3");
        assert!(status.success(), "iperf3: {status}");
        sum
    }
}

/// Starts everything that the guest does, as processes behind the shell.
fn start_load(vm: &mut Vm, tap: &Tap, partner: &Partner) {
    let (host, guest, port) = (tap.address(1), tap.address(2), partner.port);
    let iperf = format!("iperf3 --client {host} --bitrate 10M --bytes 60M");
    for (name, command) in [
        ("fio", fio("/dev/vdb", 8)),
        ("iperf3", iperf),
        ("stream", format!("md5sum </dev/tcp/{host}/{port}")),
    ] {
        let script = format!("{command} >/run/{name} 2>&1; echo \"status $? of {name}\"");
        let script = script.replace('"', "\\\"").replace('$', "\\$");
        vm.send(format!("echo \"{script}\" >/run/{name}.sh\n"));
    }
    vm.send(format!(
        "ip addr add {guest}/24 dev eth0; ip link set eth0 up\n\
         (i=0; while :; do i=$((i+1)); echo $i >/run/count; done) &\n\
         for n in fio iperf3 stream; do bash /run/$n.sh & done; echo \"$n started\"\n"
    ));
    vm.wait_for("stream started\r");
}

/// A Debian with four vCPUs, in the middle of fio with verification, iperf3, and a TCP stream.
fn debian_goes_on(transport: &str) {
    let (freezer, tap) = (Freezer::alone(), Tap::new(true));
    let programs = Programs::of(&debian());
    let partner = Partner::start(&programs, &tap);
    let image = empty_image(&freezer, 32);
    let root = format!("{},snapshot=on", debian().display());
    let data = format!("{},id=data", image.display());
    let net = format!("tap={}", tap.name);
    let mut vm = Rvmm::virtio("console=ttyS0 quiet panic=-1 root=/dev/vda net.ifnames=0")
        .args(["--mem", "512M", "--cpus", "4", "--transport", transport])
        .args(["--disk", &root, "--disk", &data, "--net", &net])
        .args(freezer.ctl("ctl"))
        .spawn();
    vm.allow_seconds(PATIENCE.as_secs());
    vm.wait_for("rvmm-debian login: ");
    vm.send("root\n");
    vm.wait_for(":~# ");
    start_load(&mut vm, &tap, &partner);
    let mut guest = Debian::of(vm);
    let before = guest.count();
    wait_for_writes(&image, 4);
    // Nothing may reach the disk or the peers after the snapshot.
    printed(["ctl", &text(&freezer.path("ctl")), "pause"]);
    let said = freezer.freeze("ctl", "snap", &[]);
    measured(&format!("Debian with four vCPUs over {transport}: {said}"));
    let console = guest.vm.console();
    assert!(
        ["fio", "iperf3", "stream"].map(|name| console.contains(&format!(" of {name}\r")))
            == [false; 3],
        "a load was over before the snapshot"
    );
    kill(guest.vm);

    let mut guest = Debian::of(freezer.thaw("snap").spawn());
    guest.vm.allow_seconds(PATIENCE.as_secs());
    let first = guest.count();
    assert!(first >= before, "{first} after {before}");
    guest.ended("fio");
    guest.ended("iperf3");
    let sum = partner.sum();
    guest.ended("stream");
    assert!(guest.count() > first);
    all_is_well(guest.vm, &sum, &image);
}

/// Compares the sums of the stream and of the disk, and looks for warnings of the kernel.
fn all_is_well(mut vm: Vm, stream: &str, image: &Path) {
    vm.send("cat /run/stream; grep 'err= 0' /run/fio; dmesg -l emerg,alert,crit,err,warn\n");
    vm.send("md5sum </dev/vdb | sed 's/ .*/ is the sum/'\n");
    vm.wait_for(" is the sum\r");
    let console = vm.console();
    for bad in WARNINGS {
        assert!(!console.contains(bad), "{bad}");
    }
    assert!(console.contains(&format!("{stream}  -")), "{stream}");
    assert!(console.contains("err= 0"), "fio found errors");
    vm.send("poweroff -f\n");
    vm.finish().assert_status(POWERED_OFF);
    let sum = md5(image);
    assert!(console.contains(&format!("{sum} is the sum")), "{sum}");
}

#[test]
fn debian_goes_on_over_pci() {
    debian_goes_on("pci");
}

#[test]
fn debian_goes_on_over_mmio() {
    debian_goes_on("mmio");
}

/// The guest, and ten copies of it, go on with fio, each on a disk of its own.
#[test]
fn ten_clones_under_fio() {
    const CLONES: usize = 10;
    let freezer = Freezer::alone();
    let image = empty_image(&freezer, 16);
    let root = format!("{},readonly", debian().display());
    let data = format!("{},id=data", image.display());
    let disks = ["--disk", &root, "--disk", &data, "--cpus", "2"];
    let rvmm = Rvmm::virtio(CMDLINE).args(disks);
    let mut guest = Shell::of(rvmm.args(freezer.ctl("ctl")));
    guest.vm.allow_seconds(PATIENCE.as_secs());
    guest.ok("mkdir /debian && mount -t ext4 -o ro /dev/vda /debian");
    guest.ok("mount -t devtmpfs dev /debian/dev && mount -t tmpfs tmp /debian/tmp");
    let fio = fio("/dev/vdb", 4);
    guest.ok(&format!(
        "(chroot /debian {fio} >/tmp/fio 2>&1; echo \"fio ended with $?\") &"
    ));
    wait_for_writes(&image, 3);
    let (socket, count) = (text(&freezer.path("ctl")), CLONES.to_string());
    let dir = freezer.path("clones");
    let said = printed(["ctl", &socket, "fork", &count, "--dir", &text(&dir)]);
    let pause = said.lines().next().expect("a line");
    measured(&format!("a fork of {CLONES} under fio: {pause}"));
    let clones = Clones(dir);
    assert!(!guest.vm.console().contains("fio ended"), "fio had ended");
    for number in 1..=CLONES {
        clones.wait_for(number, "fio ended with 0\r");
    }
    guest.vm.wait_for("fio ended with 0\r");
    drop(clones);
    kernel_is_content(&mut guest);
    guest.power_off();
}

/// Clones in a directory. Dropped, they are ended.
struct Clones(PathBuf);

impl Clones {
    fn file(&self, number: usize, name: &str) -> String {
        read_to_string(self.0.join(format!("{number}/{name}"))).unwrap_or_default()
    }

    /// Waits until this clone's console shows `line`.
    fn wait_for(&self, number: usize, line: &str) {
        wait_until(&format!("clone {number}"), || {
            let console = self.file(number, "console");
            assert!(console.len() < 64 * line.len(), "clone {number}: {console}");
            console.contains(line)
        });
    }
}

impl Drop for Clones {
    fn drop(&mut self) {
        for number in 1.. {
            let socket = self.0.join(format!("{number}/ctl"));
            if !socket.exists() {
                break;
            }
            if thread::panicking() {
                let [console, log] = ["console", "log"].map(|name| self.file(number, name));
                eprintln!("---- clone {number}:\n{console}\n{log}");
            }
            let _ = rvmm_with(["ctl", &text(&socket), "stop"]);
        }
    }
}
