//! Promise: the log is the same log on hardware that only a lab has: a kernel's RDMA device, device-dax, a second host.
//!
//! `scripts/test` runs these tests in `scripts/lab`; elsewhere they are ignored. Tests of any RDMA are in `verbs.rs`.

use crate::support::verbs::{REGION, order_and_integrity, over, publish, shell, small, strong};
use crate::support::{Cluster, assert_exactly_once, history, message};
use embarcadero_client::{BrokerId, Client, ClientConfig, RdmaConfig, TransportKind};
use std::process::Command;

const VERBS: (&str, &str) = ("EMBARCADERO_BROKER_TRANSPORT", "verbs");

/// Publishes to topic `t` by an independent implementation on pyverbs, and reads it.
fn publishes_by_pyverbs(cluster: &Cluster) {
    let client = over(TransportKind::Verbs, cluster);
    let next = client.describe_topic("t").unwrap().1[0].next_offset;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/pyverbs_publish.py");
    for round in 0..3u64 {
        let messages = ["first".to_owned(), format!("round {round}"), "x".repeat(1000)];
        let said =
            Command::new("/usr/bin/python3").args([script, cluster.control(), "t"]).args(&messages).output().unwrap();
        let errors = String::from_utf8_lossy(&said.stderr);
        assert!(said.status.success(), "{errors}");
        let offset: u64 = String::from_utf8(said.stdout).unwrap().trim().parse().unwrap();
        assert_eq!(offset, next + round * 3);
        let mut subscriber = client.subscriber("t", embarcadero_client::Start::Offset(offset)).unwrap();
        for expected in &messages {
            let message = subscriber.next(crate::support::PATIENCE).unwrap().unwrap();
            assert_eq!(message.payload, expected.as_bytes());
        }
    }
}

mod one_guest {
    use super::*;
    use std::process::Stdio;

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn an_independent_implementation_publishes_over_verbs() {
        let cluster = Cluster::start(1, REGION, &[VERBS]);
        over(TransportKind::Verbs, &cluster).create_topic("t", strong()).unwrap();
        publishes_by_pyverbs(&cluster);
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn a_region_on_huge_pages() {
        shell(
            "mkdir -p /run/huge
            mount -t hugetlbfs none /run/huge
            echo 112 > /proc/sys/vm/nr_hugepages",
        );
        order_and_integrity(
            TransportKind::Verbs,
            &Cluster::start_on("/run/huge/region".into(), 1, REGION, &[VERBS]),
            300,
        );
        shell("umount /run/huge; echo 0 > /proc/sys/vm/nr_hugepages");
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn a_client_takes_the_first_of_its_devices_that_can_be_used() {
        shell("ip link add d1 type dummy; rdma link add rxe1 type rxe netdev d1");
        let cluster = Cluster::start(1, REGION, &[VERBS, ("EMBARCADERO_BROKER_RDMA__DEVICE", "rxe0")]);
        let over = |devices: &[&str]| {
            let devices = devices.iter().map(|device| (*device).to_owned()).collect();
            let rdma = RdmaConfig { devices, ..RdmaConfig::default() };
            Client::connect(ClientConfig { transport: TransportKind::Verbs, rdma, ..small(&cluster) })
        };
        let error = over(&["rxe1"]).map(drop).unwrap_err().to_string();
        assert!(error.contains("rxe1 has no active port"), "{error}");
        let error = over(&["rxe9"]).map(drop).unwrap_err().to_string();
        assert!(error.contains("no RDMA device rxe9; there are: rxe"), "{error}");
        let client = over(&["rxe9", "rxe1", "rxe0"]).unwrap();
        client.create_topic("t", strong()).unwrap();
        publish(client, "t", 0, 100).join().unwrap();
        assert_exactly_once(&history(&cluster.client(), "t")[&0], 100);
        shell("rdma link delete rxe1; ip link delete d1");
    }

    fn link(state: &str) {
        shell(&format!("ip link set d0 {state}"));
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn a_port_that_goes_down_and_comes_back_loses_nothing() {
        let cluster = Cluster::start(1, REGION, &[VERBS]);
        let client = over(TransportKind::Verbs, &cluster);
        client.create_topic("t", strong()).unwrap();
        let publisher = client.publisher("t").unwrap();
        for number in 0..2000 {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        publisher.flush().unwrap();
        link("down");
        for number in 2000..2200 {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        let refused = Client::connect(ClientConfig { transport: TransportKind::Verbs, ..cluster.config() }).map(drop);
        assert!(refused.unwrap_err().to_string().contains("no active port"));
        link("up");
        Command::new("ip").args(["addr", "add", "10.0.0.1/24", "dev", "d0"]).stderr(Stdio::null()).status().unwrap();
        publisher.flush().unwrap();
        assert_exactly_once(&history(&client, "t")[&0], 2200);
    }
}

mod rxe_and_nics_in_software {
    use super::*;
    use crate::support::wire::enter;
    #[cfg(feature = "dpdk")]
    use embarcadero_client::Start;
    #[cfg(feature = "dpdk")]
    use std::{io::Write, process::Stdio};

    const KERNEL: &str = "10.9.0.1";
    const SOFTWARE: &str = "10.9.0.2";
    const NAMESPACE: &str = "/run/netns/soft";

    /// Wire from a device of the kernel's soft-RoCE in this namespace to another namespace with NICs in software.
    struct Bridge;

    impl Bridge {
        fn new() -> Self {
            shell(&format!(
                "modprobe -a veth sch_netem
                ip netns add soft
                ip link add kernel mtu 4500 type veth peer name soft mtu 4500 netns soft
                ip addr add {KERNEL}/24 dev kernel
                ip -n soft addr add {SOFTWARE}/24 dev soft
                ip link set kernel up
                ip -n soft link set soft up
                ip -n soft link set lo up
                rdma link add rxe9 type rxe netdev kernel
                ip link set d0 down"
            ));
            Self
        }
    }

    impl Drop for Bridge {
        fn drop(&mut self) {
            shell(
                "rdma link delete rxe9
                ip netns del soft
                ip link set d0 up
                ip addr add 10.0.0.1/24 dev d0 2>/dev/null || true",
            );
        }
    }

    /// Calls `act` in the namespace with NICs in software.
    fn in_software<R: Send>(act: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(NAMESPACE);
                act()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn software_broker() -> Cluster {
        let mut cluster = Cluster::start(0, REGION, &[("EMBARCADERO_BROKER_TRANSPORT", "roce")]);
        let any = format!("{SOFTWARE}:0");
        cluster.add_under(&["ip", "netns", "exec", "soft"], &["--data", &any, "--control", &any]);
        cluster
    }

    fn kernel_broker() -> Cluster {
        let mut cluster = Cluster::start(0, REGION, &[VERBS, ("EMBARCADERO_BROKER_RDMA__DEVICE", "rxe9")]);
        let any = format!("{KERNEL}:0");
        cluster.add(&["--data", &any, "--control", &any]);
        cluster
    }

    #[test]
    #[ignore = "needs the kernel's soft-RoCE: scripts/lab has it"]
    fn clients_over_verbs_and_a_broker_in_software() {
        let _bridge = Bridge::new();
        let cluster = software_broker();
        order_and_integrity(TransportKind::Verbs, &cluster, 1000);
        publishes_by_pyverbs(&cluster);
    }

    #[test]
    #[ignore = "needs the kernel's soft-RoCE: scripts/lab has it"]
    fn clients_in_software_and_a_broker_over_verbs() {
        let _bridge = Bridge::new();
        let cluster = kernel_broker();
        in_software(|| order_and_integrity(TransportKind::Roce, &cluster, 1000));
    }

    #[test]
    #[ignore = "needs the kernel's soft-RoCE: scripts/lab has it"]
    fn both_ways_over_a_wire_that_loses_repeats_and_reorders() {
        let _bridge = Bridge::new();
        shell(
            "tc qdisc add dev kernel root netem delay 100us loss 1% duplicate 1% reorder 98%
            tc -n soft qdisc add dev soft root netem delay 100us loss 1% duplicate 1% reorder 98%",
        );
        let cluster = software_broker();
        order_and_integrity(TransportKind::Verbs, &cluster, 300);
        drop(cluster);
        let cluster = kernel_broker();
        in_software(|| order_and_integrity(TransportKind::Roce, &cluster, 300));
    }

    /// Settings of DPDK's device on the interface of the namespace, at an address that the kernel does not know.
    #[cfg(feature = "dpdk")]
    const PORT: [(&str, &str); 3] = [
        (
            "DPDK__EAL",
            r#"["--no-huge", "--no-shconf", "--no-pci", "--no-telemetry", "-m", "256",
            "--vdev=net_af_packet0,iface=soft,blocksz=65536,framesz=8192,framecnt=512"]"#,
        ),
        ("DPDK__ADDRESS", "10.9.0.3"),
        ("DPDK__MTU", "8150"),
    ];

    #[test]
    #[cfg(feature = "dpdk")]
    #[ignore = "needs the kernel's soft-RoCE: scripts/lab has it"]
    fn clients_over_verbs_and_a_broker_over_dpdk() {
        let _bridge = Bridge::new();
        let mut cluster = Cluster::start(0, REGION, &[("EMBARCADERO_BROKER_TRANSPORT", "dpdk")]);
        for (name, value) in PORT {
            cluster.set(&format!("EMBARCADERO_BROKER_{name}"), value);
        }
        let any = format!("{SOFTWARE}:0");
        cluster.add_under(&["ip", "netns", "exec", "soft"], &["--data", &any, "--control", &any]);
        order_and_integrity(TransportKind::Verbs, &cluster, 1000);
        publishes_by_pyverbs(&cluster);
    }

    #[test]
    #[cfg(feature = "dpdk")]
    #[ignore = "needs the kernel's soft-RoCE: scripts/lab has it"]
    fn clients_over_dpdk_and_a_broker_over_verbs() {
        let _bridge = Bridge::new();
        let cluster = kernel_broker();
        over(TransportKind::Verbs, &cluster).create_topic("t", strong()).unwrap();
        let run = |arguments: &[&str], input: &str| {
            let mut command = cluster.command(arguments);
            command.env("EMBARCADERO_CLIENT_TRANSPORT", "dpdk").stdin(Stdio::piped());
            command.envs(PORT.map(|(name, value)| (format!("EMBARCADERO_CLIENT_{name}"), value)));
            let mut child = in_software(|| command.spawn().unwrap());
            child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
            assert!(child.wait().unwrap().success(), "{arguments:?}");
        };
        let lines: String = (0..2000).map(|number| format!("line {number}\n")).collect();
        run(&["produce", "t"], &lines);
        run(&["verify", "t"], "");
        let mut subscriber = over(TransportKind::Verbs, &cluster).subscriber("t", Start::Earliest).unwrap();
        for line in lines.lines() {
            assert_eq!(subscriber.next(crate::support::PATIENCE).unwrap().unwrap().payload, line.as_bytes());
        }
    }

    /// Soft-RoCE takes batches of at most 8 MiB (rxe_param.h, RXE_MAX_MSG_SZ).
    #[test]
    #[ignore = "needs the kernel's soft-RoCE: scripts/lab has it"]
    fn batches_of_all_sizes() {
        let _bridge = Bridge::new();
        let publish_all = |transport, cluster: &Cluster| {
            let config =
                ClientConfig { transport, batch_size: Some(2 << 20), buffer_bytes: 8 << 20, ..cluster.config() };
            let client = Client::connect(config).unwrap();
            client.create_topic("t", strong()).unwrap();
            let publisher = client.publisher("t").unwrap();
            let sizes = [64, 4096 - 64, 4096, 10_001, 65_536, 1 << 20];
            for size in sizes {
                publisher.publish_wait(&vec![size as u8; size]).unwrap();
                publisher.flush().unwrap();
            }
            let mut subscriber = client.subscriber("t", embarcadero_client::Start::Earliest).unwrap();
            for size in sizes {
                let message = subscriber.next(crate::support::PATIENCE).unwrap().unwrap();
                assert!(message.payload == vec![size as u8; size], "{size} bytes differ");
            }
        };
        let cluster = software_broker();
        publish_all(TransportKind::Verbs, &cluster);
        drop(cluster);
        let cluster = kernel_broker();
        in_software(|| publish_all(TransportKind::Roce, &cluster));
    }
}

mod cxl {
    use super::*;
    use crate::support::refused;

    #[test]
    #[ignore = "needs a CXL device and an RDMA device: scripts/lab run --cxl has both"]
    fn a_region_on_fsdax_is_refused() {
        shell(
            "ndctl destroy-namespace -f namespace0.0
            ndctl create-namespace -m fsdax --map mem
            mkfs.ext4 -q -b 4096 /dev/pmem0
            mkdir -p /run/fsdax
            mount -o dax /dev/pmem0 /run/fsdax",
        );
        let path = "/run/fsdax/region";
        let made =
            crate::support::run(&["region", "create", "--path", path, "--size", "120MiB", "--segment-size", "1MiB"]);
        assert!(made.status.success());
        refused(&["broker", "--region", path], &[VERBS], "is a file on fsdax");
        shell(
            "umount /run/fsdax
            ndctl destroy-namespace -f namespace0.0
            ndctl create-namespace -m devdax -a 4k --map mem",
        );
    }

    #[test]
    #[ignore = "needs /dev/dax0.0 and an RDMA device: scripts/lab run --cxl has both"]
    fn order_and_integrity_on_device_dax() {
        let dax = "/dev/dax0.0".into();
        let cluster = Cluster::start_on(dax, 2, REGION, &[VERBS]);
        order_and_integrity(TransportKind::Verbs, &cluster, 1500);
        drop(cluster);
        let create = ["region", "create", "--path", "/dev/dax0.0", "--size", "192MiB"];
        refused(&create, &[], "exists already");
        assert!(crate::support::run(&[&create[..], &["--force"]].concat()).status.success());
        assert!(crate::support::run(&["region", "destroy", "--path", "/dev/dax0.0"]).status.success());
        assert!(crate::support::run(&create).status.success());
    }

    /// The last of these tests: memory that is system-ram is no device any more.
    #[test]
    #[ignore = "needs a CXL device and an RDMA device: scripts/lab run --cxl has both"]
    fn system_ram_is_used_if_it_stays_where_it_is() {
        shell("modprobe kmem; daxctl reconfigure-device -m system-ram dax0.0");
        let devices: serde_json::Value = serde_json::from_str(&shell("daxctl list")).unwrap();
        let node = devices[0]["target_node"].as_u64().unwrap().to_string();
        let path = "/dev/shm/system-ram";
        // Small: the kernel clears each page of it through the emulated device.
        let small = ["--size", "32MiB", "--segment-size", "1MiB", "--max-brokers", "2", "--max-topics", "1"];
        let create = [&small[..], &["--numa-node", &node]].concat();
        let environment = [VERBS, ("EMBARCADERO_BROKER_CXL__NUMA_NODE", &node)];
        let made = crate::support::run(&[&["region", "create", "--path", path][..], &create[..]].concat());
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        // In the movable zone the pages cannot be pinned; the kernel moves them to do that.
        refused(&["broker", "--region", path], &environment, &format!("are not on NUMA node {node}"));
        std::fs::remove_file(path).unwrap();

        shell("daxctl offline-memory dax0.0; daxctl online-memory --no-movable dax0.0");
        order_and_integrity(TransportKind::Verbs, &Cluster::start_on(path.into(), 2, &create, &environment), 300);
    }
}

mod two_guests {
    use super::*;
    use crate::support::etcd::Etcd;
    use crate::support::eventually;
    use std::path::PathBuf;

    /// Signs that guests give each other in one test, through files.
    struct Signs {
        guest: u32,
        address: String,
        test: &'static str,
        shared: PathBuf,
    }

    impl Signs {
        fn new(test: &'static str) -> Self {
            let variable = |name| std::env::var(name).unwrap();
            let (guest, address) = (variable("LAB_GUEST").parse().unwrap(), variable("LAB_ADDRESS"));
            Self { guest, address, test, shared: PathBuf::from(variable("LAB_SHARED")) }
        }

        fn said(&self, name: &str) -> Option<String> {
            let text = std::fs::read_to_string(self.shared.join(format!("{}.{name}", self.test))).ok();
            text.filter(|text| !text.is_empty())
        }

        fn say(&self, name: &str, text: &str) {
            let new = self.shared.join(format!("new.{}", self.guest));
            std::fs::write(&new, text).unwrap();
            std::fs::rename(new, self.shared.join(format!("{}.{name}", self.test))).unwrap();
        }

        fn wait(&self, name: &str) -> String {
            eventually(&format!("the other guest's sign {name}"), || self.said(name).is_some());
            self.said(name).unwrap()
        }
    }

    /// Guest 1 has the leader, guest 2 another broker. Their region is in shared CXL memory that nothing keeps coherent.
    /// Both guests publish over verbs to both brokers, and read the same order.
    #[test]
    #[ignore = "needs two hosts that share CXL memory: scripts/lab run --guests 2 --cxl has them"]
    fn brokers_on_two_hosts_without_coherence_agree_on_one_order() {
        const COUNT: u64 = 800;
        let signs = Signs::new("order");
        let (guest, address) = (signs.guest, &signs.address);
        let (said, say) = (|name: &str| signs.said(name), |name: &str, text: &str| signs.say(name, text));
        let environment = [
            VERBS,
            ("EMBARCADERO_BROKER_CXL__COHERENCE", "none"),
            ("EMBARCADERO_BROKER_ROLE", if guest == 1 { "leader" } else { "follower" }),
        ];
        let (data, control) = (format!("{address}:7001"), format!("{address}:7000"));
        let arguments = ["--id", if guest == 1 { "0" } else { "1" }, "--data", &data, "--control", &control];
        let mut cluster = if guest == 1 {
            let create =
                ["--size", "192MiB", "--segment-size", "2MiB", "--max-brokers", "2", "--allocator", "partitioned"];
            Cluster::start_on("/dev/dax0.0".into(), 0, &create, &environment)
        } else {
            eventually("the leader starts", || said("leader").is_some());
            Cluster::on("/dev/dax0.0".into(), &environment)
        };
        cluster.add(&arguments);
        if guest == 1 {
            say("leader", &control);
        }
        cluster.await_brokers(2);
        let client = over(TransportKind::Verbs, &cluster);
        if guest == 1 {
            client.create_topic("t", strong()).unwrap();
            say("topic", "t");
        }
        eventually("the topic is there", || said("topic").is_some());
        publish(over(TransportKind::Verbs, &cluster), "t", guest, COUNT).join().unwrap();
        say(&format!("published.{guest}"), "all");
        eventually("the other has published", || said("published.1").is_some() && said("published.2").is_some());
        let seen = history(&client, "t");
        assert_exactly_once(&seen[&1], COUNT);
        assert_exactly_once(&seen[&2], COUNT);
        say(&format!("seen.{guest}"), &format!("{seen:?}"));
        let other = signs.wait(&format!("seen.{}", 3 - guest));
        assert!(other == format!("{seen:?}"), "two hosts read different orders");
        say(&format!("done.{guest}"), "done");
        eventually("the other is done", || said("done.1").is_some() && said("done.2").is_some());
    }

    /// Each guest has a broker, nothing keeps their memory coherent, and etcd elects. Guest 1's broker leads and is killed.
    /// Guest 2's broker takes over. All batches before and after are there once and in order.
    #[test]
    #[ignore = "needs two hosts that share CXL memory: scripts/lab run --guests 2 --cxl has them"]
    fn the_other_host_takes_over_without_coherence() {
        const COUNT: u64 = 300;
        let signs = Signs::new("takeover");
        let (guest, address) = (signs.guest, signs.address.clone());
        let etcd = (guest == 1).then(|| {
            let etcd = Etcd::start(address.parse().unwrap());
            signs.say("etcd", &etcd.endpoints());
            etcd
        });
        let endpoints = signs.wait("etcd");
        let environment = [
            ("EMBARCADERO_BROKER_CXL__COHERENCE", "none"),
            ("EMBARCADERO_BROKER_MEMBERSHIP", "etcd"),
            ("EMBARCADERO_BROKER_ETCD__ENDPOINTS", &endpoints),
            // Emulated hosts stand still for longer than real ones.
            ("EMBARCADERO_BROKER_ETCD__LEASE_S", "30"),
        ];
        let (data, control) = (format!("{address}:7001"), format!("{address}:7000"));
        let arguments = ["--id", if guest == 1 { "0" } else { "1" }, "--data", &data, "--control", &control];
        let mut cluster = if guest == 1 {
            let create = ["--size", "192MiB", "--segment-size", "2MiB", "--max-brokers", "2"];
            let create = [&create[..], &["--allocator", "partitioned", "--force"]].concat();
            Cluster::start_on("/dev/dax0.0".into(), 0, &create, &environment)
        } else {
            signs.wait("leader");
            Cluster::on("/dev/dax0.0".into(), &environment)
        };
        cluster.add(&arguments);
        if guest == 1 {
            assert_eq!(cluster.brokers[cluster.leader()].id, BrokerId(0));
            cluster.client_of_all().create_topic("t", strong()).unwrap();
            signs.say("leader", &control);
        }
        cluster.await_brokers(2);
        let publisher = cluster.client_of_all().publisher("t").unwrap();
        let publish = |from: u64| {
            for number in from..from + COUNT {
                publisher.publish_wait(&message(guest, number)).unwrap();
            }
            publisher.flush().unwrap();
        };
        publish(0);
        signs.say(&format!("published.{guest}"), "all");
        if guest == 1 {
            signs.wait("published.2");
            cluster.kill(0);
            signs.say("dead", "the leader");
            signs.wait("checked");
            // It comes back, follows, and reads the same.
            cluster.add(&arguments);
            let seen = history(&cluster.client_of_all(), "t");
            assert_exactly_once(&seen[&1], COUNT);
            assert_exactly_once(&seen[&2], 2 * COUNT);
            signs.say("done", "all");
        } else {
            signs.wait("dead");
            eventually("guest 2 leads", || cluster.view().brokers.iter().any(|b| b.leader && b.id == BrokerId(1)));
            publish(COUNT);
            let seen = history(&cluster.client_of_all(), "t");
            assert_exactly_once(&seen[&1], COUNT);
            assert_exactly_once(&seen[&2], 2 * COUNT);
            signs.say("checked", "all");
            signs.wait("done");
        }
        drop(etcd);
    }
}
