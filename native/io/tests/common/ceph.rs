//! A real Ceph cluster for the tests of one program: the one that `ATOLL_TEST_CEPH_CONF` names, or one of their own, which ends with
//! the program.
use atoll_io::RadosOptions;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The pool that clusters of tests have.
pub const POOL: &str = "atoll";

/// The `ceph.conf`; `None`: Ceph is not installed, and nobody requires it.
pub fn conf() -> Option<&'static PathBuf> {
    static CONF: OnceLock<Option<PathBuf>> = OnceLock::new();
    CONF.get_or_init(|| {
        if let Some(conf) = std::env::var_os("ATOLL_TEST_CEPH_CONF") {
            return Some(conf.into());
        }
        start("")
    })
    .as_ref()
}

/// A cluster that this program may hurt: its conf and its folder.
pub fn own_cluster(name: &str) -> Option<(PathBuf, PathBuf)> {
    let conf = start(name)?;
    let folder = conf.parent().unwrap().to_owned();
    Some((conf, folder))
}

/// Starts one that ends with this program.
fn start(name: &str) -> Option<PathBuf> {
    let folder = std::env::temp_dir().join(format!("atoll-ceph-{}{name}", std::process::id()));
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../southbound/ceph/testing/cluster.sh");
    let made = Command::new(script)
        .arg("start")
        .arg(&folder)
        .env("OWNER_PID", std::process::id().to_string())
        .output()
        .expect("the script that starts a cluster is there");
    if made.status.success() {
        return Some(folder.join("ceph.conf"));
    }
    let text = String::from_utf8_lossy(&made.stderr);
    let is_required = std::env::var("ATOLL_TEST_REQUIRE").is_ok_and(|value| value == "all");
    assert!(made.status.code() == Some(3) && !is_required, "no cluster could be started: {text}");
    let _ = std::fs::remove_dir_all(&folder);
    eprintln!("skipped, without Ceph: {text}");
    None
}

/// A pool in a namespace that nobody uses yet.
pub fn options() -> Option<RadosOptions> {
    Some(options_in(conf()?.clone()))
}

/// The same in the cluster of this conf.
pub fn options_in(conf: PathBuf) -> RadosOptions {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    RadosOptions {
        conf: Some(conf),
        keyring: None,
        user: "admin".to_owned(),
        pool: POOL.to_owned(),
        namespace: format!("test-{}-{number}", std::process::id()),
        // Only for what hangs.
        request_timeout: Duration::from_secs(600),
        connect_timeout: Duration::from_secs(300),
        create: true,
    }
}
