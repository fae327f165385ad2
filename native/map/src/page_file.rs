//! The local file that clean leaves are evicted to. Its content means nothing after the process: it has no name while in use.
use crate::{MapError, MapErrorCode, Result};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Places are multiples of this; a place is the smallest power of two, or one and a half of one, that holds the page.
const PLACE_BYTES_MIN: u64 = 64;
/// A position is `offset << LENGTH_BITS | length`; the length is never 0, so neither is a position.
const LENGTH_BITS: u32 = 16;
/// Offsets below this fit into a position.
const OFFSET_LIMIT_BYTES: u64 = 1 << (u64::BITS - LENGTH_BITS);

const _: () = assert!(crate::codec::PAGE_BYTES_MAX < 1 << LENGTH_BITS, "the length of every page fits into a position");

/// Pages written are kept at their position until it is released; free places are used again by size.
pub(crate) struct PageFile {
    file: File,
    space: Mutex<Space>,
}

#[derive(Default)]
struct Space {
    end_bytes: u64,
    /// Offsets of free places by their size.
    free: BTreeMap<u64, Vec<u64>>,
}

impl PageFile {
    /// Makes the file (mode 0600) and takes its name away at once, so that not even a kill leaves it behind.
    pub(crate) fn create(path: &Path) -> Result<PageFile> {
        let failed = |error: std::io::Error| page_file_error(format!("{}: {error}", path.display()));
        // Only a process killed between the next two steps can have left one; nobody else uses the name.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        std::fs::remove_file(path).map_err(failed)?;
        Ok(PageFile { file, space: Mutex::default() })
    }

    /// Writes a page somewhere; returns its position, never 0.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<u64> {
        let length = bytes.len() as u64;
        assert!(length > 0 && length < 1 << LENGTH_BITS, "a page of {length} bytes");
        let offset = self.take_place(length)?;
        let position = (offset << LENGTH_BITS) | length;
        self.file.write_all_at(bytes, offset).map_err(|error| {
            self.release(position);
            page_file_error(format!("writing {length} bytes at {offset} of the page file: {error}"))
        })?;
        Ok(position)
    }

    /// Reads the page at a position that `write` returned.
    pub(crate) fn read(&self, position: u64) -> Result<Vec<u8>> {
        let (offset, length) = take_apart(position);
        let mut bytes = vec![0; length as usize];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|error| page_file_error(format!("reading {length} bytes at {offset} of the page file: {error}")))?;
        Ok(bytes)
    }

    /// The place may be used again. Nobody may read the position any more.
    pub(crate) fn release(&self, position: u64) {
        let (offset, length) = take_apart(position);
        self.space.lock().free.entry(place_bytes(length)).or_default().push(offset);
    }

    fn take_place(&self, length: u64) -> Result<u64> {
        let size = place_bytes(length);
        let mut space = self.space.lock();
        if let Some(offset) = space.free.get_mut(&size).and_then(Vec::pop) {
            return Ok(offset);
        }
        let offset = space.end_bytes;
        if offset + size > OFFSET_LIMIT_BYTES {
            return Err(page_file_error(format!("the page file has reached its limit of {OFFSET_LIMIT_BYTES} bytes")));
        }
        space.end_bytes += size;
        Ok(offset)
    }

    /// Bytes that the file takes at most.
    #[cfg(test)]
    pub(crate) fn end_bytes(&self) -> u64 {
        self.space.lock().end_bytes
    }

    /// Damages all that was written.
    #[cfg(test)]
    pub(crate) fn damage(&self) {
        self.file.write_all_at(&vec![0xff; self.end_bytes() as usize], 0).unwrap();
    }
}

fn take_apart(position: u64) -> (u64, u64) {
    (position >> LENGTH_BITS, position & ((1 << LENGTH_BITS) - 1))
}

fn place_bytes(length: u64) -> u64 {
    let power = length.max(PLACE_BYTES_MIN).next_power_of_two();
    let three_quarters = power / 4 * 3;
    if length <= three_quarters && three_quarters >= PLACE_BYTES_MIN { three_quarters } else { power }
}

fn page_file_error(message: String) -> MapError {
    MapError { code: MapErrorCode::PageFile, page_id: 0, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_file_has_no_name_and_is_for_its_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pages");
        std::fs::write(&path, "left behind").unwrap();
        let file = PageFile::create(&path).unwrap();
        assert!(std::fs::read_dir(directory.path()).unwrap().next().is_none());
        assert_eq!(file.file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(file.file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn a_directory_that_is_missing_is_an_error_naming_the_path() {
        let error = PageFile::create(Path::new("/nonexistent-atoll/pages")).err().unwrap();
        assert_eq!(error.code, MapErrorCode::PageFile);
        assert!(error.message.contains("/nonexistent-atoll/pages"));
    }

    #[test]
    fn pages_read_back_and_released_places_are_used_again() {
        let directory = tempfile::tempdir().unwrap();
        let file = PageFile::create(&directory.path().join("pages")).unwrap();
        let pages: Vec<Vec<u8>> = [1, 63, 64, 65, 96, 97, 1040, 16_400, 49_160].map(|length| vec![length as u8; length]).into();
        for round in 0..3 {
            let positions: Vec<u64> = pages.iter().map(|page| file.write(page).unwrap()).collect();
            let end_bytes = file.end_bytes();
            for (page, &position) in pages.iter().zip(&positions) {
                assert_eq!(&file.read(position).unwrap(), page);
            }
            positions.iter().for_each(|&position| file.release(position));
            assert_eq!(file.end_bytes(), end_bytes, "round {round} grew the file");
        }
        assert!(file.end_bytes() < 64 + 64 + 64 + 96 + 96 + 128 + 1536 + 24_576 + 65_536 + 1);
    }
}
