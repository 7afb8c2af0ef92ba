//! A real etcd.

use super::{address_at, eventually};
use embarcadero_control::etcd::kv_client::KvClient;
use embarcadero_control::etcd::request_op::Request;
use embarcadero_control::etcd::{PutRequest, RequestOp, TxnRequest};
use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Asks an etcd at `address` whether it serves requests. It accepts connections before it does.
fn is_healthy(address: &str) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.contains(r#""health":"true""#))
}

/// Etcd of one member, which is killed when dropped.
pub(crate) struct Etcd {
    child: Option<Child>,
    data: TempDir,
    client: String,
    peer: String,
}

impl Etcd {
    /// Starts one that serves at `address`.
    pub(crate) fn start(address: IpAddr) -> Self {
        let url = || format!("http://{}", address_at(address));
        let (client, peer) = (url(), url());
        let mut etcd = Self { child: None, data: tempfile::tempdir().unwrap(), client, peer };
        etcd.restart();
        etcd
    }

    /// Starts it again at its address, with its data.
    pub(crate) fn restart(&mut self) {
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
        eventually("etcd serves", || is_healthy(address).unwrap_or(false));
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Kills it and removes its data.
    pub(crate) fn wipe(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.data.path().join("data")).unwrap();
    }

    /// Writes an entry, as somebody else would.
    pub(crate) fn put(&self, key: String, value: String) {
        let put = Request::RequestPut(PutRequest { key: key.into(), value: value.into(), lease: 0 });
        let request = TxnRequest { compare: vec![], success: vec![RequestOp { request: Some(put) }] };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut keys = KvClient::connect(self.client.clone()).await.unwrap();
            assert!(keys.txn(request).await.unwrap().into_inner().succeeded);
        });
    }

    /// Returns the value of `etcd.endpoints` for it.
    pub(crate) fn endpoints(&self) -> String {
        format!("[{:?}]", self.client)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}
