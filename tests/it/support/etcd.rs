//! A real etcd.

use super::{address_at, eventually};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// Etcd of one member, which is killed when dropped.
pub struct Etcd {
    child: Option<Child>,
    data: TempDir,
    client: String,
    peer: String,
}

impl Etcd {
    /// Starts one that serves at `address`.
    pub fn start(address: IpAddr) -> Self {
        let url = || format!("http://{}", address_at(address));
        let (client, peer) = (url(), url());
        let mut etcd = Self { child: None, data: tempfile::tempdir().unwrap(), client, peer };
        etcd.restart();
        etcd
    }

    /// Starts it again at its address, with its data.
    pub fn restart(&mut self) {
        let (client, peer) = (&self.client, &self.peer);
        let log = std::fs::File::create(self.data.path().join("log")).unwrap();
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.data.path().join("data"))
            .args(["--listen-client-urls", client, "--advertise-client-urls", client])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("etcd (hw-setup/deps installs it)");
        self.child = Some(child);
        let address = self.client.trim_start_matches("http://");
        eventually("etcd serves", || std::net::TcpStream::connect(address).is_ok());
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Kills it and removes its data.
    pub fn wipe(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.data.path().join("data")).unwrap();
    }

    /// Returns the value of `etcd.endpoints` for it.
    pub fn endpoints(&self) -> String {
        format!("[{:?}]", self.client)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}
