use super::*;
use crate::cover::CoverBuilder;
use proptest::prelude::*;

fn cover_of(owner_at: impl Fn(usize) -> u32) -> Cover {
    let mut builder = CoverBuilder::default();
    (0..SLOTS).for_each(|slot| builder.push(1, owner_at(slot)));
    builder.finish()
}

/// A leaf page of every form and width.
fn leaf_samples() -> Vec<(&'static str, Cover)> {
    vec![
        ("one run", cover_of(|slot| u32::from(slot == 77))),
        ("a run at each end", cover_of(|slot| if (5..=8000).contains(&slot) { 3 } else { 9 })),
        ("a hundred runs", cover_of(|slot| (slot / 40 % 2) as u32 * 7)),
        ("two owners", cover_of(|slot| (slot % 2) as u32)),
        ("three owners", cover_of(|slot| 5 + (slot % 3) as u32)),
        ("sixteen owners", cover_of(|slot| 1 + (slot % 16) as u32)),
        ("two hundred owners", cover_of(|slot| 1 + (slot * 7 % 200) as u32)),
        ("as many owners as slots", cover_of(|slot| u32::MAX - slot as u32)),
    ]
}

fn inner_samples() -> Vec<[PageWord; FANOUT]> {
    let page = |index: usize| PageWord::Page { id: 1000 + index as u64, crc: index as u32 };
    vec![
        std::array::from_fn(page),
        std::array::from_fn(|index| if index == 255 { page(index) } else { PageWord::Uniform(4) }),
        std::array::from_fn(|index| if index % 3 == 0 { page(index) } else { PageWord::Uniform(index as u32 / 10) }),
        std::array::from_fn(|index| PageWord::Uniform(u32::from(index > 3))),
    ]
}

fn all_pages() -> Vec<(u8, Vec<u8>)> {
    let leaves = leaf_samples().into_iter().map(|(_, cover)| (0, encode_leaf(&cover)));
    let inner = inner_samples().into_iter().zip([1, 2, 3, 3]).map(|(words, level)| (level, encode_inner(level, &words)));
    leaves.chain(inner).collect()
}

/// Whatever a decoded page holds can be written and read again.
fn assert_usable(level: u8, page: &Page) {
    match page {
        Page::Leaf(body) => {
            let cover = body.cover();
            assert_eq!(decode_leaf(1, &encode_leaf(&cover)).unwrap().cover(), cover);
        }
        Page::Inner(words) => {
            let Page::Inner(again) = decode(1, level, &encode_inner(level, words)).unwrap() else { panic!("an inner page") };
            assert_eq!(&again, words);
        }
    }
}

#[test]
fn every_form_of_leaf_reads_back_as_it_was_written() {
    for (name, cover) in leaf_samples() {
        let bytes = encode_leaf(&cover);
        assert!(bytes.len() <= PAGE_BYTES_MAX, "{name}: {} bytes", bytes.len());
        assert_eq!(decode_leaf(1, &bytes).unwrap().cover(), cover, "{name}");
    }
}

#[test]
fn inner_pages_read_back_as_they_were_written() {
    for (words, level) in inner_samples().iter().zip([1, 2, 3, 3]) {
        let bytes = encode_inner(level, words);
        let Page::Inner(decoded) = decode(1, level, &bytes).unwrap() else { panic!("an inner page") };
        assert_eq!(&*decoded, words);
    }
}

#[test]
fn a_leaf_takes_the_shorter_form() {
    let lengths: Vec<usize> = leaf_samples().iter().map(|(_, cover)| encode_leaf(cover).len()).collect();
    let palette = |owner_count: usize, width: usize| HEADER_BYTES + OWNER_BYTES * owner_count + SLOTS * width / 8;
    let runs = |run_count: usize| HEADER_BYTES + OWNER_BYTES + RUN_BYTES * run_count;
    let wanted = [runs(1), runs(1), runs(102), palette(2, 1), palette(3, 2), palette(16, 4), palette(200, 8), palette(SLOTS, 16)];
    assert_eq!(lengths, wanted);
}

#[test]
fn the_layout_is_the_documented_one() {
    assert_eq!(
        encode_leaf(&cover_of(|slot| if slot == 77 { 0x0102_0304 } else { 9 })),
        [0x4d, 0x50, 1, 2, 0, 0, 1, 0, 9, 0, 0, 0, 77, 0, 1, 0, 4, 3, 2, 1]
    );
    let mut words = [PageWord::Uniform(6); FANOUT];
    words[2] = PageWord::Page { id: 0x0807_0605_0403_0201, crc: 0x0d0c_0b0a };
    words[255] = PageWord::Uniform(7);
    assert_eq!(
        encode_inner(3, &words),
        [
            &[0x4d, 0x50, 1, 1, 3, 0, 2, 0, 6, 0, 0, 0][..],
            &[2, 2, 2, 1, 2, 3, 4, 5, 6, 7, 8, 0x0a, 0x0b, 0x0c, 0x0d],
            &[255, 255, 1, 7, 0, 0, 0]
        ]
        .concat()
    );
    let palette = encode_leaf(&cover_of(|slot| if slot % 3 == 1 { 5 } else { 4 }));
    assert_eq!(palette[..20], [0x4d, 0x50, 1, 3, 0, 1, 2, 0, 4, 0, 0, 0, 5, 0, 0, 0, 0b1001_0010, 0b0010_0100, 0b0100_1001, 0b1001_0010]);
}

#[test]
fn a_changed_byte_is_found_by_the_crc_and_harms_nobody_without_it() {
    for (level, bytes) in all_pages() {
        let crc = crc32c::crc32c(&bytes);
        // Of a long page the first bytes, then every 37th: the rest is more of the same array.
        for offset in (0..bytes.len()).filter(|offset| *offset < 300 || offset % 37 == 0) {
            for mask in [1, 0x10, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[offset] ^= mask;
                assert_eq!(check_crc(7, &changed, crc).unwrap_err().code, MapErrorCode::PageCorrupt);
                match decode(7, level, &changed) {
                    Ok(page) => assert_usable(level, &page),
                    Err(error) => assert_eq!(error.page_id, 7),
                }
            }
        }
    }
}

#[test]
fn a_page_cut_short_or_too_long_is_refused() {
    for (level, bytes) in all_pages() {
        for length in 0..bytes.len() {
            assert!(decode(1, level, &bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
        }
        for extra in [1, 8, 70_000] {
            let mut longer = bytes.clone();
            longer.resize(bytes.len() + extra, 0);
            assert!(decode(1, level, &longer).is_err(), "{extra} bytes more");
        }
    }
}

#[test]
fn a_page_of_a_newer_version_says_so_and_what_to_do() {
    let mut bytes = encode_leaf(&leaf_samples()[0].1);
    bytes[VERSION_OFFSET] = VERSION + 1;
    let error = decode(9, 0, &bytes).err().unwrap();
    assert_eq!((error.code, error.page_id), (MapErrorCode::PageVersion, 9));
    assert!(error.message.contains("version 2") && error.message.contains("up to 1"), "{}", error.message);
    bytes[VERSION_OFFSET] = 0;
    assert_eq!(decode(9, 0, &bytes).err().unwrap().code, MapErrorCode::PageCorrupt);
}

#[test]
fn a_page_at_another_level_than_its_parent_says_is_refused() {
    for (level, bytes) in all_pages() {
        for wanted_level in (0..=4).filter(|&wanted| wanted != level) {
            assert_eq!(decode(1, wanted_level, &bytes).err().unwrap().code, MapErrorCode::PageCorrupt);
        }
    }
}

/// What each check of the decoder refuses.
#[test]
fn every_rule_of_the_layout_is_checked() {
    let runs = |base: u32, runs: &[(u16, u16, u32)]| {
        let mut bytes = header(FORM_RUNS, 0, 0, runs.len(), 0);
        bytes.extend(base.to_le_bytes());
        for (start, count, owner) in runs {
            bytes.extend([start.to_le_bytes(), count.to_le_bytes()].concat());
            bytes.extend(owner.to_le_bytes());
        }
        (0, bytes)
    };
    let palette = |width: u8, owners: &[u32], first_indices: u8| {
        let mut bytes = header(FORM_PALETTE, 0, width, owners.len(), 0);
        owners.iter().for_each(|owner| bytes.extend(owner.to_le_bytes()));
        bytes.push(first_indices);
        bytes.resize(bytes.len() - 1 + SLOTS * usize::from(width) / 8, 0);
        (0, bytes)
    };
    let inner = |ranges: &[&[u8]]| {
        let mut bytes = header(FORM_INNER, 1, 0, ranges.len(), 0);
        bytes.extend([0; 4]);
        bytes.extend(ranges.concat());
        (1, bytes)
    };
    let page_range = |first: u8, id: u64| [&[first, first, RANGE_PAGES][..], &id.to_le_bytes(), &[0; 4]].concat();
    let accepted = [
        ("runs", runs(0, &[(0, 1, 1), (1, 1, 2), (8191, 1, 1)])),
        ("palette", palette(1, &[4, 5], 2)),
        ("inner", inner(&[&page_range(0, 1), &[1, 255, 1, 9, 0, 0, 0]])),
    ];
    for (name, (level, bytes)) in accepted {
        assert_usable(level, &decode(1, level, &bytes).unwrap_or_else(|error| panic!("{name}: {error}")));
    }
    let refused = [
        ("no runs", runs(0, &[])),
        ("an empty run", runs(0, &[(5, 0, 1)])),
        ("a run over the end", runs(0, &[(8191, 2, 1)])),
        ("a run that starts beyond the end", runs(0, &[(u16::MAX, u16::MAX, 1)])),
        ("a run that is the leaf", runs(0, &[(0, 8192, 1)])),
        ("overlapping runs", runs(0, &[(0, 5, 1), (4, 1, 2)])),
        ("descending runs", runs(0, &[(9, 1, 1), (4, 1, 2)])),
        ("a run of the base's owner", runs(1, &[(0, 5, 1)])),
        ("touching runs of one owner", runs(0, &[(0, 5, 1), (5, 1, 1)])),
        ("one owner with a palette", palette(1, &[4], 0)),
        ("wider indices than needed", palette(2, &[4, 5], 4)),
        ("narrower indices than needed", palette(1, &[4, 5, 6], 2)),
        ("an index width of 3", palette(3, &[4, 5], 2)),
        ("an index width of 0", palette(0, &[4, 5], 2)),
        ("an index width of 255", palette(255, &[4, 5], 2)),
        ("an index beyond the owners", palette(2, &[4, 5, 6], 0b1110_0100)),
        ("an owner that no slot has", palette(2, &[4, 5, 6], 0b0000_0100)),
        ("owners in another order than slots have them", palette(1, &[4, 5], 1)),
        ("an owner listed twice", palette(1, &[4, 4], 2)),
        ("no ranges", inner(&[])),
        ("page id 0", inner(&[&page_range(0, 0)])),
        ("a page id beyond the limit", inner(&[&page_range(0, PAGE_ID_LIMIT)])),
        ("descending ranges", inner(&[&page_range(5, 1), &page_range(4, 2)])),
        ("a child twice", inner(&[&page_range(5, 1), &page_range(5, 2)])),
        ("a range that ends before it starts", inner(&[&[5, 4, 1, 9, 0, 0, 0]])),
        ("a range of an unknown kind", inner(&[&[5, 6, 3, 9, 0, 0, 0]])),
        ("one owner for all children", inner(&[&[0, 255, 1, 9, 0, 0, 0]])),
    ];
    for (name, (level, bytes)) in refused {
        assert_eq!(decode(1, level, &bytes).err().unwrap_or_else(|| panic!("{name} was accepted")).code, MapErrorCode::PageCorrupt);
    }
}

proptest! {
    #[test]
    fn random_bytes_behind_a_true_header_are_refused_or_usable(
        form in 0..5_u8, level in 0..4_u8, width in prop_oneof![Just(0_u8), Just(1), Just(2), Just(4), Just(8), Just(16), any::<u8>()],
        count in prop_oneof![0..20_u16, any::<u16>()], body in prop::collection::vec(any::<u8>(), 0..2500),
    ) {
        let mut bytes = header(form, level, width, usize::from(count), 0);
        bytes.extend(body);
        if let Ok(page) = decode(1, level, &bytes) {
            assert_usable(level, &page);
        }
    }

    #[test]
    fn the_same_content_gives_the_same_bytes(owners in prop::collection::vec((1..400_usize, 0..20_u32), 1..200)) {
        let slots: Vec<u32> = owners.iter().flat_map(|&(count, owner)| std::iter::repeat_n(owner, count)).chain(std::iter::repeat(99)).take(SLOTS).collect();
        let cover = cover_of(|slot| slots[slot]);
        prop_assume!(cover.owners.len() > 1);
        let bytes = encode_leaf(&cover);
        // However it came into memory: decoded, or put together from the last run to the first.
        let decoded = decode_leaf(1, &bytes).unwrap();
        prop_assert_eq!(&encode_leaf(&decoded.cover()), &bytes);
        let again = cover.runs.iter().rev().fold(cover_of(|slot| slot as u32), |again, run| {
            let start = usize::from(run.start);
            again.with_run(start, start + usize::from(run.count), cover.owner(run))
        });
        prop_assert_eq!(encode_leaf(&again), bytes);
    }
}
