# What each variable accepts, at its limits, and what it refuses at plan time.

mock_provider "ibm" {}

variables {
  ibmcloud_api_key = "key"
  region           = "eu-de"
  elastic_password = "Correct-horse-1"
}

run "takes_the_shortest_password" {
  command = plan

  variables {
    elastic_password = "Abcdefghijklmn1"
  }
}

run "takes_the_longest_password" {
  command = plan

  variables {
    elastic_password = "A1bbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
  }
}

run "takes_elasticsearch_8_18_and_9" {
  command = plan

  variables {
    elasticsearch_version = "8.18"
  }
}

run "takes_elasticsearch_9_1" {
  command = plan

  variables {
    elasticsearch_version = "9.1"
  }
}

run "takes_elasticsearch_10_0" {
  command = plan

  variables {
    elasticsearch_version = "10.0"
  }
}

run "takes_the_least_memory_and_disk" {
  command = plan

  variables {
    member_memory_mb = 4096
    member_disk_mb   = 5120
  }
}

run "takes_memory_with_the_shared_flavor" {
  command = plan

  variables {
    member_memory_mb = 8192
    host_flavor      = "multitenant"
  }
}

run "takes_the_platinum_plan_with_an_isolated_flavor" {
  command = plan

  variables {
    plan        = "platinum"
    host_flavor = "b3c.4x16.encrypted"
  }
}

run "takes_a_hundred_addresses_and_ranges" {
  command = plan

  variables {
    allowlist = [for number in range(100) : number % 2 == 0 ? "203.0.113.${number}" : "10.${number}.0.0/16"]
  }
}

run "refuses_the_platinum_plan_on_shared_machines" {
  command = plan

  variables {
    plan = "platinum"
  }

  expect_failures = [var.plan]
}

run "refuses_a_hundred_and_one_addresses" {
  command = plan

  variables {
    allowlist = [for number in range(101) : "203.0.113.${number}"]
  }

  expect_failures = [var.allowlist]
}

run "refuses_an_ipv6_address" {
  command = plan

  variables {
    allowlist = ["2001:db8::1"]
  }

  expect_failures = [var.allowlist]
}

run "refuses_an_address_that_cannot_be" {
  command = plan

  variables {
    allowlist = ["203.0.113.256"]
  }

  expect_failures = [var.allowlist]
}

run "refuses_a_range_that_cannot_be" {
  command = plan

  variables {
    allowlist = ["198.51.100.0/33"]
  }

  expect_failures = [var.allowlist]
}

run "refuses_a_host_name_in_the_allowlist" {
  command = plan

  variables {
    allowlist = ["office.example.com"]
  }

  expect_failures = [var.allowlist]
}

run "refuses_a_short_password" {
  command = plan

  variables {
    elastic_password = "Abcdefghijklm1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_long_password" {
  command = plan

  variables {
    elastic_password = "A1bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_with_a_slash" {
  command = plan

  variables {
    elastic_password = "Abcdefghijklm/1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_that_begins_with_a_hyphen" {
  command = plan

  variables {
    elastic_password = "-Abcdefghijklmn1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_that_begins_with_an_underscore" {
  command = plan

  variables {
    elastic_password = "_Abcdefghijklmn1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_without_an_uppercase_letter" {
  command = plan

  variables {
    elastic_password = "abcdefghijklmn1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_without_a_lowercase_letter" {
  command = plan

  variables {
    elastic_password = "ABCDEFGHIJKLMN1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_without_a_digit" {
  command = plan

  variables {
    elastic_password = "Abcdefghijklmno"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_the_examples_password" {
  command = plan

  variables {
    elastic_password = "<make-up-a-password>"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_no_api_key" {
  command = plan

  variables {
    ibmcloud_api_key = " "
  }

  expect_failures = [var.ibmcloud_api_key]
}

run "refuses_the_examples_api_key" {
  command = plan

  variables {
    ibmcloud_api_key = "<your_api_key>"
  }

  expect_failures = [var.ibmcloud_api_key]
}

run "refuses_no_region" {
  command = plan

  variables {
    region = ""
  }

  expect_failures = [var.region]
}

run "refuses_a_zone_for_a_region" {
  command = plan

  variables {
    region = "us-south-1"
  }

  expect_failures = [var.region]
}

run "refuses_the_tutorials_placeholder_for_a_region" {
  command = plan

  variables {
    region = "<your_region>"
  }

  expect_failures = [var.region]
}

run "refuses_a_version_with_a_patch" {
  command = plan

  variables {
    elasticsearch_version = "8.19.9"
  }

  expect_failures = [var.elasticsearch_version]
}

run "refuses_a_version_without_a_minor" {
  command = plan

  variables {
    elasticsearch_version = "8"
  }

  expect_failures = [var.elasticsearch_version]
}

run "refuses_a_version_too_old_for_search" {
  command = plan

  variables {
    elasticsearch_version = "8.15"
  }

  expect_failures = [var.elasticsearch_version]
}

run "refuses_a_version_of_long_ago" {
  command = plan

  variables {
    elasticsearch_version = "7.17"
  }

  expect_failures = [var.elasticsearch_version]
}

run "refuses_too_little_memory" {
  command = plan

  variables {
    member_memory_mb = 4095
  }

  expect_failures = [var.member_memory_mb]
}

run "refuses_half_a_megabyte" {
  command = plan

  variables {
    member_memory_mb = 4096.5
  }

  expect_failures = [var.member_memory_mb]
}

run "refuses_memory_with_an_isolated_flavor" {
  command = plan

  variables {
    member_memory_mb = 16384
    host_flavor      = "b3c.4x16.encrypted"
  }

  expect_failures = [var.member_memory_mb]
}

run "refuses_too_little_disk" {
  command = plan

  variables {
    member_disk_mb = 5119
  }

  expect_failures = [var.member_disk_mb]
}

run "refuses_an_unknown_endpoint" {
  command = plan

  variables {
    service_endpoints = "internet"
  }

  expect_failures = [var.service_endpoints]
}

run "refuses_an_unknown_plan" {
  command = plan

  variables {
    plan = "standard"
  }

  expect_failures = [var.plan]
}

run "refuses_an_unknown_flavor" {
  command = plan

  variables {
    host_flavor = "large"
  }

  expect_failures = [var.host_flavor]
}

run "refuses_an_empty_name" {
  command = plan

  variables {
    name = ""
  }

  expect_failures = [var.name]
}

run "refuses_an_empty_resource_group" {
  command = plan

  variables {
    resource_group = " "
  }

  expect_failures = [var.resource_group]
}

run "refuses_a_tag_with_a_comma" {
  command = plan

  variables {
    tags = ["a,b"]
  }

  expect_failures = [var.tags]
}
