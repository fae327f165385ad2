//! A raw file as a store with one layer.
mod common;

use atoll_io::{IoErrorCode, LayerId, OpenMode, RawFileStore, Store};
use common::{TemporaryFolder, read, write};

#[test]
fn a_raw_file_is_one_layer_that_can_be_read_and_not_written() {
    let folder = TemporaryFolder::new();
    let path = folder.path().join("source.raw");
    std::fs::write(&path, b"some bytes").unwrap();
    let store = RawFileStore::open(&path).unwrap();
    assert_eq!(store.length_bytes(), 10);
    assert_eq!(store.list_layers().unwrap().len(), 1);

    // Another file under the path is not the one that was opened.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"other").unwrap();
    let layer = store.open_layer(RawFileStore::LAYER, OpenMode::ReadOnly).unwrap();
    assert_eq!(read(&*layer, 5, 12), b"bytes\0\0\0\0\0\0\0");

    let code = |result: atoll_io::Result<()>| result.unwrap_err().code;
    assert_eq!(code(write(&*layer, 0, b"x")), IoErrorCode::ReadOnly);
    assert_eq!(code(store.open_layer(RawFileStore::LAYER, OpenMode::ReadWrite).map(drop)), IoErrorCode::ReadOnly);
    assert_eq!(code(store.open_layer(LayerId([1; 16]), OpenMode::ReadOnly).map(drop)), IoErrorCode::NotFound);
    assert_eq!(code(store.create_layer(LayerId([1; 16]))), IoErrorCode::ReadOnly);
}

#[test]
fn only_a_regular_file_is_opened() {
    let folder = TemporaryFolder::new();
    assert!(RawFileStore::open(folder.path()).is_err());
    assert!(RawFileStore::open(&folder.path().join("missing")).is_err_and(|error| error.code == IoErrorCode::NotFound));
    assert!(RawFileStore::open(std::path::Path::new("/dev/zero")).is_err());
}
