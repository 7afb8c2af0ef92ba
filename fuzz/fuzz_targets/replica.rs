//! Fuzzes replica files: any bytes are refused, or all batches found in them can be read and lie within the file.
#![no_main]

use embarcadero_broker::replica::format::{BLOCK, Identity, check_group};
use embarcadero_broker::replica::medium::Medium;
use embarcadero_broker::replica::store::{read_batch, scan};
use embarcadero_os::buffer::Buffer;
use embarcadero_sim::SimulatedMedium;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = Identity::parse(bytes);
    if let Ok((header, records)) = check_group(bytes) {
        assert!(records.iter().all(|record| record.at + u64::from(record.bytes) <= header.bytes));
    }
    let medium = SimulatedMedium::default();
    let mut file = medium.create("0000000000.replica").expect("memory");
    let mut buffer = Buffer::new(bytes.len().next_multiple_of(BLOCK).max(BLOCK)).expect("memory");
    buffer.extend_from_slice(bytes);
    file.write(0, &buffer).expect("memory");
    let scanned = scan(&medium).expect("memory does not fail");
    let mut batch = Vec::new();
    for located in scanned.batches(&medium).expect("what was verified is there") {
        read_batch(&medium, &located, &mut batch).expect("what was verified is there");
    }
});
