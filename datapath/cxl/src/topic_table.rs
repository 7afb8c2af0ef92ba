//! Topic table: the configuration of every topic, in each leader's area.

use crate::fabric::{Fabric, LINE_BYTES};
use crate::layout::{LeaderArea, MAX_BROKERS, NameLine, PinLine, TOPIC_NAME_BYTES, TopicLine, TopicState};
use crate::leadership::{NoLeader, with_leader};
use crate::region::Region;
use crate::row::{Damage, Row};
use crate::site::Site;
use bytemuck::Zeroable;
use embarcadero_wire::{BrokerId, Incarnation, MAX_ACK_LEVEL, Order, TopicId};
use serde::Serialize;
use std::mem::offset_of;

/// Configuration of a topic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopicConfig {
    /// Slot.
    pub id: TopicId,
    /// Count of the topics that used this slot.
    pub incarnation: Incarnation,
    /// State.
    pub state: TopicState,
    /// Name, 1 to 64 bytes; empty after a repair that lost it.
    pub name: String,
    /// Order.
    pub order: Order,
    /// Highest acknowledgement level that a session may ask for.
    pub ack_level: u8,
    /// Copies including the one in CXL memory.
    pub replication_factor: u8,
    /// Bytes that are kept; 0 keeps everything.
    pub retention_bytes: u64,
    /// Milliseconds for which messages are kept; 0 keeps everything.
    pub retention_ms: u64,
    /// Time of creation, milliseconds since 1970.
    pub created_ms: u64,
}

/// Checks a topic name that may be in the table.
///
/// # Errors
/// A sentence that names the bound. It repeats the name only if that is short.
pub fn check_topic_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > TOPIC_NAME_BYTES {
        return Err(format!("topic name has {} bytes; it must have 1 to {TOPIC_NAME_BYTES}", name.len()));
    }
    if name.chars().any(|character| character.is_control() || character.is_whitespace()) {
        return Err(format!("topic name {name:?} must not contain spaces or control characters"));
    }
    Ok(())
}

/// Checks the name of a topic that is to be created. Programs put it into paths, addresses and command lines.
///
/// # Errors
/// A sentence that names the bound. It repeats the name only if that is short.
pub fn check_new_topic_name(name: &str) -> Result<(), String> {
    check_topic_name(name)?;
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.starts_with('.') || !name.bytes().all(allowed) {
        let text = "must consist of ASCII letters, digits, '.', '_' and '-', and not begin with '.'";
        return Err(format!("topic name {name:?} {text}"));
    }
    Ok(())
}

/// Writes a topic's configuration. Only the leader may.
///
/// # Panics
/// When the name is longer than [`TOPIC_NAME_BYTES`]: [`check_topic_name`] refuses it.
pub fn publish_topic<F: Fabric>(region: &Region<F>, area: LeaderArea, config: &TopicConfig) {
    let bytes = config.name.as_bytes();
    let mut name = NameLine::zeroed();
    name.name[..bytes.len()].copy_from_slice(bytes);
    let line = TopicLine {
        incarnation: config.incarnation,
        state: config.state.code(),
        order: config.order.code(),
        ack_level: config.ack_level,
        replication_factor: config.replication_factor,
        retention_bytes: config.retention_bytes,
        retention_ms: config.retention_ms,
        created_ms: config.created_ms,
        name_bytes: bytes.len() as u32,
        ..TopicLine::zeroed()
    };
    let (fabric, layout) = (region.fabric(), region.layout());
    let name_at = layout.topic_name(area, config.id);
    fabric.publish_versioned_with(layout.topic(area, config.id), &line, Site::TopicFlush, || {
        fabric.store_line(name_at, &name);
        fabric.flush(name_at, LINE_BYTES, Site::TopicFlush);
    });
}

/// Repairs a topic row that an earlier leader left half written: the topic is deleted. It was being created, and no
/// client was told, or it was being deleted. Only a successor may, before it activates its term.
pub fn repair_torn_topic<F: Fabric>(region: &Region<F>, area: LeaderArea, topic: TopicId) {
    let (fabric, at) = (region.fabric(), region.layout().topic(area, topic));
    // A damaged row stays as it is: no topic gets its slot.
    let Ok(line) = fabric.observe_line::<TopicLine>(at, Site::TopicRead) else { return };
    if line.version & 1 == 1 {
        let live = line.state == TopicState::Live.code();
        let state = if live { TopicState::Deleting.code() } else { line.state };
        // The name may be half of one and half of another. In a slot that was never used, the other words may be zero.
        let name_at = region.layout().topic_name(area, topic);
        let order = Order::from_code(line.order).unwrap_or(Order::Strong).code();
        let replication_factor = line.replication_factor.max(1);
        let nameless = TopicLine { state, order, replication_factor, name_bytes: 0, ..line };
        fabric.publish_versioned_with(at, &nameless, Site::TopicFlush, || {
            fabric.store_line(name_at, &NameLine::zeroed());
            fabric.flush(name_at, LINE_BYTES, Site::TopicFlush);
        });
    }
}

/// Reads a topic slot.
///
/// # Errors
/// [`NoLeader`].
pub fn read_topic<F: Fabric>(region: &Region<F>, topic: TopicId) -> Result<Row<TopicConfig>, NoLeader> {
    with_leader(region, |area| read_topic_at(region, area, topic))
}

/// Reads a topic slot of one leader's area. A slot that the region does not have is unused.
pub fn read_topic_at<F: Fabric>(region: &Region<F>, area: LeaderArea, topic: TopicId) -> Row<TopicConfig> {
    if topic.0 >= region.geometry().max_topics {
        return Row::Unused;
    }
    let (fabric, layout) = (region.fabric(), region.layout());
    let name_at = layout.topic_name(area, topic);
    let name = |_: &TopicLine| fabric.observe_words::<NameLine>(name_at, Site::TopicRead);
    let at = layout.topic(area, topic);
    let row = fabric.observe_versioned(at, Site::TopicRead, name);
    if matches!(&row, Row::Used((line, _)) if line.state != TopicState::Live.code()) {
        // Brokers give back what they hold of the topic.
        fabric.ensure_in_memory(at, Site::TopicFlush);
    }
    row.decode(|(line, name)| {
        let damage = |what, value| Damage { structure: "TopicLine", at, what, value };
        let (bytes, padding) = name
            .name
            .split_at_checked(line.name_bytes as usize)
            .ok_or_else(|| damage("name_bytes", line.name_bytes.into()))?;
        if let Some(byte) = padding.iter().find(|byte| **byte != 0) {
            return Err(damage("byte behind the name", (*byte).into()));
        }
        if line.ack_level > MAX_ACK_LEVEL {
            return Err(damage("ack_level", line.ack_level.into()));
        }
        if !(1..=MAX_BROKERS).contains(&line.replication_factor.into()) {
            return Err(damage("replication_factor", line.replication_factor.into()));
        }
        let text =
            std::str::from_utf8(bytes).map_err(|error| damage("byte of the name", error.valid_up_to() as u64))?;
        Ok(TopicConfig {
            id: topic,
            incarnation: line.incarnation,
            state: TopicState::from_code(line.state).ok_or_else(|| damage("state", line.state.into()))?,
            name: text.to_owned(),
            order: Order::from_code(line.order).ok_or_else(|| damage("order", line.order.into()))?,
            ack_level: line.ack_level,
            replication_factor: line.replication_factor,
            retention_bytes: line.retention_bytes,
            retention_ms: line.retention_ms,
            created_ms: line.created_ms,
        })
    })
}

/// Topic slots of one leader's area, as one reading of the table found them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopicRows {
    /// Topics that are live.
    pub live: Vec<TopicConfig>,
    /// Slots whose row is damaged. Each may be that of a live topic.
    pub damaged: Vec<(TopicId, Damage)>,
}

impl TopicRows {
    /// Reads the topic table of a leader's area.
    pub fn read<F: Fabric>(region: &Region<F>, area: LeaderArea) -> Self {
        let mut rows = Self::default();
        for slot in region.geometry().topics() {
            match read_topic_at(region, area, slot) {
                Row::Used(config) if config.state == TopicState::Live => rows.live.push(config),
                Row::Damaged(damage) => rows.damaged.push((slot, damage)),
                Row::Used(_) | Row::Unused | Row::Unsettled => {}
            }
        }
        rows
    }
}

const RELEASED: u64 = offset_of!(PinLine, released) as u64;

/// Records that this broker holds nothing of the topic's incarnations up to `incarnation`.
pub fn publish_released<F: Fabric>(region: &Region<F>, topic: TopicId, broker: BrokerId, incarnation: Incarnation) {
    let at = region.layout().pin(topic, broker).add(RELEASED);
    let fabric = region.fabric();
    fabric.store(at, incarnation.word());
    fabric.flush(at, 8, Site::PinFlush);
    fabric.fence(Site::PinFlush);
}

/// Reads the highest incarnation of a topic of which a broker holds nothing any more.
///
/// # Errors
/// [`Damage`] when the word is no incarnation.
pub fn read_released<F: Fabric>(region: &Region<F>, topic: TopicId, broker: BrokerId) -> Result<Incarnation, Damage> {
    let at = region.layout().pin(topic, broker).add(RELEASED);
    let value = region.fabric().observe(at, Site::PinRead);
    Incarnation::from_word(value).ok_or(Damage { structure: "PinLine", at, what: "released", value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::WORD_BYTES;
    use crate::layout::AllocatorKind;
    use crate::segment::tests::region;

    #[test]
    fn names_of_new_topics_are_plain() {
        for name in ["a", "0", "_", "-", "a.b", "A-1_z", &"x".repeat(64)] {
            assert_eq!(check_new_topic_name(name), Ok(()), "{name}");
        }
        for name in ["", &"x".repeat(65), "a b", "a\n", ".", "..", ".a", "../../x", "a/b", "a:b", "\u{e4}", "a\0"] {
            assert!(check_new_topic_name(name).is_err(), "{name:?}");
        }
        // A topic that an earlier version made is still found.
        assert_eq!(check_topic_name("a/b"), Ok(()));
        assert!(check_topic_name(&"x".repeat(4 << 20)).unwrap_err().len() < 100);
    }

    #[test]
    fn a_damaged_word_releases_nothing() {
        let (region, topic, broker) = (region(1, AllocatorKind::Bitmap), TopicId(0), BrokerId(1));
        publish_released(&region, topic, broker, Incarnation(2));
        assert_eq!(read_released(&region, topic, broker), Ok(Incarnation(2)));
        let at = region.layout().pin(topic, broker).add(RELEASED);
        region.fabric().store(at, 1 << 40);
        let damage = Damage { structure: "PinLine", at, what: "released", value: 1 << 40 };
        assert_eq!(read_released(&region, topic, broker), Err(damage));
    }

    #[test]
    fn a_damaged_row_is_not_an_unused_one() {
        let (region, area, id) = (region(1, AllocatorKind::Bitmap), LeaderArea(BrokerId(0)), TopicId(0));
        let config = TopicConfig {
            id,
            incarnation: Incarnation(1),
            state: TopicState::Live,
            name: "t".to_owned(),
            order: Order::Strong,
            ack_level: 1,
            replication_factor: 1,
            retention_bytes: 0,
            retention_ms: 0,
            created_ms: 0,
        };
        publish_topic(&region, area, &config);
        assert_eq!(TopicRows::read(&region, area), TopicRows { live: vec![config], damaged: vec![] });
        let behind_the_name = region.layout().topic_name(area, id).add(WORD_BYTES);
        region.fabric().store(behind_the_name, 5);
        let TopicRows { live, damaged } = TopicRows::read(&region, area);
        assert!(live.is_empty() && damaged[0].0 == id && damaged[0].1.what == "byte behind the name", "{damaged:?}");
    }
}
